"""`tidegate manifests`: what is installed into a cluster, as YAML."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from tidegate.api.names import SYSTEM_NAMESPACE

app = typer.Typer(
    no_args_is_help=True,
    help="Print what a cluster needs, ready for `kubectl apply --server-side -f -`.",
)

Namespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Namespace that the controller, extender and picker run in.")
]


@app.command("crds")
def print_crds() -> None:
    """Print the CustomResourceDefinitions of the three kinds."""
    from tidegate.render import manifests

    typer.echo(manifests.to_yaml(manifests.crds()), nl=False)


@app.command("rbac")
def print_rbac(namespace: Namespace = SYSTEM_NAMESPACE) -> None:
    """Print ServiceAccounts, roles and bindings of the parts, and the roles for people."""
    from tidegate.render import manifests

    typer.echo(manifests.to_yaml(manifests.rbac(namespace)), nl=False)


@app.command("admission")
def print_admission() -> None:
    """Print the admission policies that hold classes to their allowedNamespaces."""
    from tidegate.render import manifests

    typer.echo(manifests.to_yaml(manifests.admission()), nl=False)


@app.command("all")
def print_all(namespace: Namespace = SYSTEM_NAMESPACE) -> None:
    """Print everything, with the namespace, in the order to apply it."""
    from tidegate.render import manifests

    typer.echo(manifests.to_yaml(manifests.install_objects(namespace)), nl=False)


@app.command("write")
def write(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; show a diff and exit 1 when a file is stale.")
    ] = False,
    root: Annotated[Path, typer.Option(help="Root of the repository's checkout.")] = Path(),
) -> None:
    """Write the generated files of the repository: crds/, the chart's templates, docs/reference/."""
    from tidegate.cli import reference
    from tidegate.render import manifests

    if not (root / "pyproject.toml").is_file():
        typer.echo(
            f"{root.resolve()} is no checkout of Tidegate (it has no pyproject.toml): give --root", err=True
        )
        raise typer.Exit(2)
    stale = {p: t for p, t in (manifests.files() | reference.pages()).items() if _read(root / p) != t}
    for path, text in stale.items():
        if check:
            typer.echo(_diff(path, _read(root / path), text), nl=False)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
            typer.echo(f"wrote {path}")
    if check and stale:
        typer.echo(f"stale: {', '.join(stale)}; run `tidegate manifests write`", err=True)
        raise typer.Exit(1)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _diff(path: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"committed/{path}", f"generated/{path}"
    )
    return "".join(lines)
