"""The suite over TLS, and the picker's own port with a certificate."""

import datetime as dt
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from typer.testing import CliRunner

from support.own_picker import KEY, NobodyToAsk, desk_of
from support.ports import free_port
from support.small_picker import POOL, SmallPicker
from tidegate.cli.main import app
from tidegate.conformance.probe import Target
from tidegate.conformance.rules import select
from tidegate.conformance.run import Tls, UnreachableError, Verdict, run
from tidegate.core.flow import Endpoint
from tidegate.picker.fronts import Health, Listen, ServerName, front
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of its own making for 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "picker")])
    now = dt.datetime.now(dt.UTC)
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("picker.example")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "tls.crt", folder / "tls.key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return cert_file, key_file


async def test_a_picker_with_a_certificate_is_asked_over_tls(files: tuple[Path, Path]) -> None:
    server, port = grpc.aio.server(), free_port()
    pb_grpc.add_ExternalProcessorServicer_to_server(SmallPicker(), server)
    credentials = grpc.ssl_server_credentials([(files[1].read_bytes(), files[0].read_bytes())])
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    try:
        address, target = f"127.0.0.1:{port}", Target("m", timeout_s=2.0)
        rules = select(["destination.header"])
        tls = Tls(on=True, ca=files[0].read_bytes())
        assert [r.verdict for r in await run(address, target, rules, tls=tls)] == [Verdict.KEPT]
        named = Tls(on=True, ca=files[0].read_bytes(), server_name="picker.example")
        assert [r.verdict for r in await run(address, target, rules, tls=named)] == [Verdict.KEPT]
        quick = Target("m", timeout_s=0.5)
        for wrong in (Tls(), Tls(on=True), Tls(on=True, ca=tls.ca, server_name="another.example")):
            with pytest.raises(UnreachableError, match=address):
                await run(address, quick, rules, tls=wrong)
    finally:
        await server.stop(0)


@pytest.mark.parametrize("server", ServerName)
async def test_our_own_port_has_a_certificate_on_either_server(
    files: tuple[Path, Path], server: ServerName
) -> None:
    desk, port = desk_of(Endpoint(one, KEY, "low", 20) for one in POOL), free_port()
    service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
    made = front(server, service, Health(), Listen("127.0.0.1", port, free_port(), files))
    await made.start()
    try:
        address, rules = f"127.0.0.1:{port}", select(["destination.header"])
        tls = Tls(on=True, ca=files[0].read_bytes())
        found = await run(address, Target("m", timeout_s=5.0), rules, tls=tls)
        assert [r.verdict for r in found] == [Verdict.KEPT]
        with pytest.raises(UnreachableError, match=address):
            await run(address, Target("m", timeout_s=0.5), rules, tls=Tls())
    finally:
        await made.drain(0)
        await made.stop()


def test_certificate_and_key_go_together(files: tuple[Path, Path]) -> None:
    for option, path in zip(("--tls-cert-file", "--tls-key-file"), files, strict=True):
        result = CliRunner().invoke(app, ["picker", option, str(path)])
        assert result.exit_code == 2
        assert "go together" in " ".join(result.output.replace("│", "").split())
