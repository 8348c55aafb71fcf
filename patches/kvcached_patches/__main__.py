"""`python -m kvcached_patches`: check engines against our hooks, lock releases, show both."""

import errno
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvcached_patches.aliases import aliases
from kvcached_patches.check import choose_targets, describe_hooks
from kvcached_patches.engines import DISTRIBUTIONS, ENGINES, Engine
from kvcached_patches.hook import Finding, candidates
from kvcached_patches.locks import (
    Lock,
    check_lock,
    examine,
    gone_since,
    locked_releases,
    order,
    read_lock,
)
from kvcached_patches.matrix import list_runs, read_runs, ticks
from kvcached_patches.options import add_options, changed_options, options_in
from kvcached_patches.sources import Sources, Wheel
from kvcached_patches.unchanged import describe_files

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(soft_wrap=True)
NUM_AT_ONCE = 8
# What is said of a file, or a terminal, that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
Names = Annotated[list[str] | None, typer.Argument(help="such as vllm==0.32.0; none means all")]


@app.command()
def check(
    names: Names = None,
    *,
    wheel: Annotated[Path | None, typer.Option(help="a wheel on this machine")] = None,
    installed: Annotated[bool, typer.Option(help="what is installed here")] = False,
) -> None:
    """Check locked releases against their wheels on the index, a wheel, or what is installed."""
    if installed:
        answers = [_check_installed(package) for package in ENGINES]
    elif wheel is not None:
        file, release = wheel.name.split("-")[:2]
        distribution = file.replace("_", "-")
        name = f"{distribution} {release}"
        hooks = DISTRIBUTIONS[distribution].locked
        answers = [_say(name, examine(hooks, distribution, release, Wheel(wheel)))]
    else:
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            found = list(pool.map(_check_on_index, _locks(names)))
        answers = [_say(f"{lock.distribution} {lock.release}", one) for lock, one in found]
        console.print(f"{sum(answers)} of {len(found)} locks fit")
    raise typer.Exit(0 if all(answers) else 1)


@app.command()
def lock(names: Annotated[list[str], typer.Argument(help="such as vllm==0.32.0")]) -> None:
    """Read releases from the index, write their locks, and say which options are new."""
    from kvcached_patches.registry import releases, whole_wheel

    for name in names:
        distribution, version = _split(name)
        engine = DISTRIBUTIONS[distribution]
        release = releases(distribution)[version]
        sources = whole_wheel(release)
        chosen = choose_targets(engine.locked, sources)
        made = Lock(
            distribution,
            version,
            release.file,
            describe_hooks(chosen, sources),
            describe_files(engine.locked, sources),
            aliases(chosen, sources, engine.package),
        )
        for finding in gone_since(engine.locked, distribution, version, made.symbols):
            console.print(f"{name}: {finding}")
        findings = check_lock(made, engine.locked, sources)
        _tell_options(engine, distribution, version, sources)
        if _say(name, findings):
            made.write()
            _write_options(engine, version, sources)
    if any(read_lock(*_split(name)) is None for name in names):
        raise typer.Exit(1)


@app.command()
def relock(names: Names = None) -> None:
    """Write locks and lists of options anew, from single files on the index.

    Who else has a name that is rebound stays as it was: a new name to rebind needs `lock`.
    """
    for old in _locks(names):
        sources = _on_index(old)
        made, findings = _relocked(old, sources)
        if not _say(f"{old.distribution} {old.release}", findings):
            raise typer.Exit(1)
        made.write()
        _write_options(DISTRIBUTIONS[old.distribution], old.release, sources)


@app.command()
def show() -> None:
    """Show every hook: what, how and why, and in which releases it is locked."""
    for title, engine in ENGINES.items():
        locks = [
            lock
            for distribution in engine.oldest
            for release in locked_releases(distribution)
            if (lock := read_lock(distribution, release)) is not None
        ]
        table = Table(title=f"{title}: {len(engine.locked)} hooks in {len(locks)} releases")
        for column in ("target", "how", "why", "ADR", "locks"):
            table.add_column(column, overflow="fold")
        for hook in engine.locked:
            targets = candidates(hook)
            number = sum(any(target in lock.symbols for target in targets) for lock in locks)
            adr = str(hook.adr or "")
            table.add_row("\n".join(targets), hook.how, hook.why, adr, str(number))
        console.print(table)


@app.command("aliases")
def show_aliases() -> None:
    """Show which other modules have a name that we rebind, by release."""
    for distribution in DISTRIBUTIONS:
        for release in locked_releases(distribution):
            found = read_lock(distribution, release)
            for target, modules in (found.aliases if found else {}).items():
                console.print(f"{distribution} {release} {target}: {', '.join(modules) or 'none'}")


RecordedRuns = Annotated[Path, typer.Option(help="the recorded runs")]
RUNS = Path("docs/support.json")


@app.command("matrix")
def show_matrix(runs: RecordedRuns = RUNS) -> None:
    """Print the support table of the README, from the locks and the recorded runs."""
    typer.echo(ticks(read_runs(runs)))


@app.command("runs")
def show_runs(runs: RecordedRuns = RUNS) -> None:
    """Print the recorded runs as docs/support.md lists them."""
    typer.echo(list_runs(read_runs(runs)))


@app.command("new-engines")
def new_engines() -> None:
    """Check releases on the index that are newer than the newest lock, or have none."""
    from kvcached_patches.registry import RemoteSources, releases

    good = True
    for distribution, engine in DISTRIBUTIONS.items():
        oldest = order(engine.oldest[distribution])
        known = set(locked_releases(distribution))
        for version, release in releases(distribution).items():
            if order(version) < oldest or version in known:
                continue
            sources = RemoteSources(release)
            findings = examine(engine.locked, distribution, version, sources)
            good = _say(f"{distribution} {version}", findings) and good
            _tell_options(engine, distribution, version, sources)
            console.print(
                f"  run: python -m kvcached_patches lock {distribution}=={version}"
                if len(findings) == 1
                else "  mend the hooks first: docs/adding-an-engine-release.md"
            )
    console.print("no release without a lock" if good else "see above")
    raise typer.Exit(0 if good else 1)


def _tell_options(engine: Engine, distribution: str, version: str, sources: Sources) -> None:
    if engine.options is not None:
        found = options_in(sources, engine.options)
        for line in changed_options(engine.package, version, found):
            console.print(f"{distribution} {version}: {line}")


def _write_options(engine: Engine, version: str, sources: Sources) -> None:
    if engine.options is not None:
        add_options(engine.package, version, options_in(sources, engine.options))


def _relocked(lock: Lock, sources: Sources) -> tuple[Lock, list[Finding]]:
    hooks = DISTRIBUTIONS[lock.distribution].locked
    symbols = describe_hooks(choose_targets(hooks, sources), sources)
    made = replace(lock, symbols=symbols, files=describe_files(hooks, sources))
    return made, check_lock(made, hooks, sources)


def _check_on_index(lock: Lock) -> tuple[Lock, list[Finding]]:
    return lock, check_lock(lock, DISTRIBUTIONS[lock.distribution].locked, _on_index(lock))


def _on_index(lock: Lock) -> Sources:
    from kvcached_patches.registry import Release, RemoteSources, url_of

    return RemoteSources(Release(lock.distribution, lock.release, lock.wheel, url_of(lock)))


def _check_installed(package: str) -> bool:
    engine = ENGINES[package]
    found = engine.installed()
    if found is None:
        console.print(f"{package}: not installed here")
        return True
    return _say(f"{found.distribution} {found.release}", engine.findings(found))


def _locks(names: Iterable[str] | None) -> list[Lock]:
    wanted = [_split(name) for name in names or ()] or [
        (distribution, release)
        for distribution in DISTRIBUTIONS
        for release in locked_releases(distribution)
    ]
    locks = [read_lock(*name) for name in wanted]
    missing = [" ".join(name) for name, lock in zip(wanted, locks, strict=True) if lock is None]
    if missing:
        raise typer.BadParameter(f"no lock of {', '.join(missing)}")
    return [lock for lock in locks if lock is not None]


def _split(name: str) -> tuple[str, str]:
    distribution, _, version = name.partition("==")
    if distribution not in DISTRIBUTIONS or not version:
        known = ", ".join(f"{known}==VERSION" for known in DISTRIBUTIONS)
        raise typer.BadParameter(f"{name!r} is no release; allowed are {known}")
    return distribution, version


def _say(what: str, findings: list[Finding]) -> bool:
    for finding in findings:
        console.print(f"{what}: {finding}")
    if not findings:
        console.print(f"{what}: fits")
    return not findings


def main() -> None:
    """Run the command; where what it prints cannot be written, one line says so."""
    try:
        app()
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        # Python would try again at the end, and complain in its own words.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"kvcached_patches: what it prints cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
