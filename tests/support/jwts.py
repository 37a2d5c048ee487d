"""An issuer of JWTs with real keys, and JWTs that are wrong in one way each."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

AUDIENCE = "tidegate"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


class Issuer:
    """Signs with RS256; `rotate` makes a new key, the old one's signatures stay what they are."""

    def __init__(self, url: str = "https://login.test") -> None:
        self.url, self._serial = url, 0
        self.rotate()

    def rotate(self) -> None:
        self._serial += 1
        self.kid = f"key-{self._serial}"
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def jwk(self) -> dict[str, Any]:
        numbers = self._key.public_key().public_numbers()
        n, e = (b64(x.to_bytes((x.bit_length() + 7) // 8, "big")) for x in (numbers.n, numbers.e))
        return {"kty": "RSA", "alg": "RS256", "use": "sig", "kid": self.kid, "n": n, "e": e}

    def jwks(self) -> str:
        return json.dumps({"keys": [self.jwk()]})

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": "ann", "iat": now, "exp": now + 600, **changes}
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, *, header: dict[str, Any] | None = None, **changes: Any) -> str:
        signed = self._signed({"alg": "RS256", "typ": "JWT", "kid": self.kid, **(header or {})}, changes)
        return f"{signed}.{b64(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    def unsigned(self, **changes: Any) -> str:
        return self._signed({"alg": "none", "typ": "JWT"}, changes) + "."

    def by_public_key(self, **changes: Any) -> str:
        """HS256 with what everybody knows as its secret."""
        signed = self._signed({"alg": "HS256", "typ": "JWT", "kid": self.kid}, changes)
        pem = self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return f"{signed}.{b64(hmac.new(pem, signed.encode(), hashlib.sha256).digest())}"

    def _signed(self, header: dict[str, Any], changes: dict[str, Any]) -> str:
        parts = (header, self.claims(**changes))
        return ".".join(b64(json.dumps(part).encode()) for part in parts)
