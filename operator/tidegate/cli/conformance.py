"""`tidegate conformance`: does a picker keep to the protocol?"""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.local import Format, Output

if TYPE_CHECKING:
    from tidegate.conformance.probe import Target
    from tidegate.conformance.rules import Rule
    from tidegate.conformance.run import Result, Tls

app = typer.Typer(help="Check that a program speaks a protocol as it is written.", no_args_is_help=True)


class Mode(StrEnum):
    """Body modes."""

    FULL_DUPLEX = "full-duplex"
    BUFFERED = "buffered"


@app.callback()
def _group() -> None:
    """Keep `epp` a sub-command while it is the only one."""


@app.command("epp")
def epp(
    address: Annotated[
        str | None, typer.Argument(metavar="HOST:PORT", help="Where the picker serves ext_proc.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of a model that it serves; required but for --list.")
    ] = None,
    path: Annotated[
        str, typer.Option(help="Path of an inference request for the model.")
    ] = "/v1/chat/completions",
    body: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON file with the request's body, for other paths."),
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="Sent with each request, such as 'authorization: Bearer …'.")
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="An `ip:port` that may be chosen; give all. Left out: what it chooses is believed."
        ),
    ] = None,
    health: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where it answers gRPC health checks.")
    ] = None,
    body_mode: Annotated[
        Mode, typer.Option(help="How bodies are sent: Envoy's request_body_mode.")
    ] = Mode.FULL_DUPLEX,
    overload: Annotated[
        int, typer.Option(min=0, help="Requests at once that are too many for it: is the answer a 429?")
    ] = 0,
    parallel: Annotated[int, typer.Option(min=2, max=1000, help="Streams at once, otherwise.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 10.0,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS.")] = False,
    ca: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Certificates to trust (PEM); implies --tls."),
    ] = None,
    server_name: Annotated[
        str | None, typer.Option(help="Name that its certificate is for, where it is not HOST.")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Check this rule, or group such as `subset`, alone.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out this rule or group.")] = None,
    list_rules: Annotated[bool, typer.Option("--list", help="Print the rules and check nothing.")] = False,
    output: Format = Output.text,
) -> None:
    """Check an endpoint picker against the rules of the Endpoint Picker Protocol, as a proxy would meet them.

    Exit code 1 when a rule that is a MUST is broken, 2 when the picker cannot be asked.
    """
    rules, module = _rules(rule or [], skip or [])
    if list_rules:
        typer.echo(_listed(rules, output))
        return
    if not address or not model:
        raise typer.BadParameter("HOST:PORT and --model NAME must be given, except with --list")
    target = module["Target"](
        model=model,
        path=path,
        headers=[_header(h) for h in header or ()],
        body=_body(body),
        endpoints=[_endpoint(e) for e in endpoint or ()],
        mode=module["BodyMode"](body_mode.value),
        timeout_s=timeout,
        parallel=parallel,
        overload=overload,
    )
    certificates = ca.read_bytes() if ca else None
    how = module["Tls"](tls or ca is not None, certificates, server_name)
    results = _run(_address(address), target, rules, health, how, output)
    if any(r.failed for r in results):
        raise typer.Exit(1)


def _run(
    address: str, target: "Target", rules: "list[Rule]", health: str | None, tls: "Tls", output: Output
) -> "list[Result]":
    import asyncio

    from tidegate.conformance import report, run

    def tell(result: "Result") -> None:
        if output is Output.text:
            typer.echo(report.line(result))

    try:
        results = asyncio.run(run.run(address, target, rules, health=health, tls=tls, tell=tell))
    except run.UnreachableError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if output is Output.json:
        typer.echo(json.dumps(report.as_object(address, results), indent=2))
    else:
        typer.echo(report.summary(results))
    return results


def _rules(wanted: list[str], skip: list[str]) -> "tuple[list[Rule], dict[str, Any]]":
    """The rules that were asked for, and what needs gRPC: it is an extra."""
    try:
        from tidegate.conformance import probe, rules, run, wire

        module = {"Target": probe.Target, "BodyMode": wire.BodyMode, "Tls": run.Tls}
        return rules.select(wanted, skip), module
    except ImportError as error:
        typer.echo(f"error: {error}; install it with: pip install 'tidegate[picker]'", err=True)
        raise typer.Exit(2) from error
    except rules.UnknownRuleError as error:
        raise typer.BadParameter(str(error), param_hint="--rule, --skip") from error


def _listed(rules: "list[Rule]", output: Output) -> str:
    from tidegate.conformance.report import describe

    if output is Output.json:
        return json.dumps([describe(r) for r in rules], indent=2)
    return "\n".join(f"{r.level:<7}{r.id:<24}{r.text}" for r in rules)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise typer.BadParameter(f"{text!r} is not `name: value`", param_hint="--header")
    return name.strip().lower(), value.strip()


def _address(text: str) -> str:
    _, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise typer.BadParameter(f"{text!r} is not HOST:PORT, such as 127.0.0.1:9002", param_hint="HOST:PORT")
    return text


def _endpoint(text: str) -> str:
    from tidegate.conformance.answer import bad_endpoint

    if problem := bad_endpoint(text):
        raise typer.BadParameter(f"{problem}; give it as 10.0.0.1:8000", param_hint="--endpoint")
    return text


def _body(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"{path} is no JSON: {error}", param_hint="--body") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} must hold a JSON object", param_hint="--body")
    return found
