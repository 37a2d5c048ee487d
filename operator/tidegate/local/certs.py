"""Keys and certificates of a local cluster.

The CA and the key that signs service-account tokens live as long as the state folder; leaf
certificates are made anew at each start, since the cluster's address may have changed.
"""

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_TEN_YEARS = dt.timedelta(days=3650)
_CLOCK_SKEW = dt.timedelta(hours=1)


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _TEN_YEARS)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """The certificate authority of one cluster, kept in `folder` as ca.crt and ca.key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.certificate.exists() and (folder / "ca.key").exists()):
            self._make()
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{folder / 'ca.key'} holds no EC key; remove the state folder and start again")
        self._key = key
        self._cert = x509.load_pem_x509_certificate(self.certificate.read_bytes())

    @property
    def certificate(self) -> Path:
        """Path of ca.crt."""
        return self.folder / "ca.crt"

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tidegate-local-ca")])
        cert = (
            _builder(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        write_secret(self.folder / "ca.key", _key_pem(key))
        write_secret(self.certificate, cert.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        common_name: str,
        hosts: Sequence[str] = (),
        client: bool = False,
        server: bool = False,
    ) -> tuple[Path, Path]:
        """Write NAME.crt and NAME.key and return their paths; `hosts` are names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = (
            _builder(subject, self._cert.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
        if hosts:
            names = x509.SubjectAlternativeName([_host(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        cert, secret = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        signed = builder.sign(self._key, hashes.SHA256())
        write_secret(secret, _key_pem(key))
        write_secret(cert, signed.public_bytes(serialization.Encoding.PEM))
        return cert, secret

    def service_account_key(self) -> tuple[Path, Path]:
        """Public and private key that sign service-account tokens; made once."""
        public, private = self.folder / "sa.pub", self.folder / "sa.key"
        if not (public.exists() and private.exists()):
            key = ec.generate_private_key(ec.SECP256R1())
            write_secret(private, _key_pem(key))
            pem = key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            write_secret(public, pem)
        return public, private


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def issue_all(authority: Authority, address: str, service_address: str) -> None:
    """Write the leaf certificates of a cluster whose servers listen on `address`."""
    cluster_names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    local = [address, "127.0.0.1", "localhost"]
    authority.issue(
        "apiserver",
        common_name="kube-apiserver",
        hosts=[*local, service_address, *cluster_names],
        server=True,
    )
    authority.issue("etcd", common_name="etcd", hosts=local, server=True, client=True)
    authority.issue("etcd-client", common_name="kube-apiserver-etcd-client", client=True)
    authority.issue("kubelet", common_name="tidegate-kubelet", hosts=local, server=True)
    authority.issue("kubelet-client", common_name="kube-apiserver-kubelet-client", client=True)
    authority.issue("scheduler", common_name="kube-scheduler", hosts=local, server=True)
    authority.service_account_key()
