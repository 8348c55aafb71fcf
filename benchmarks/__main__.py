"""`python -m benchmarks list | run | report | figures | draw`; `--help` says what each takes."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the scripts import each other as neighbours

from catalog import BENCHMARKS, GPU, HOST, TWO_GPUS, Benchmark  # noqa: E402  after the path

from kvcached_core.cli.output import printing  # noqa: E402  after the path

GROUPS = {"all-host": HOST, "all-gpu": GPU, "all-two-gpus": TWO_GPUS}


def command(benchmark: Benchmark, results: Path, more: Sequence[str]) -> list[str]:
    """Return how a benchmark is started; what the caller adds comes last and wins."""
    output = [benchmark.output, str(results / benchmark.result_name)]
    return [
        sys.executable, str(HERE / benchmark.script), *benchmark.arguments, *output, *more
    ]  # fmt: skip


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks that the names, or groups, stand for.

    Raises:
        SystemExit: If one is not known; the message names those that are.
    """
    known = {benchmark.name: [benchmark] for benchmark in BENCHMARKS}
    known |= {
        group: [benchmark for benchmark in BENCHMARKS if benchmark.where == where]
        for group, where in GROUPS.items()
    }
    for name in names:
        if name not in known:
            raise SystemExit(f"benchmark {name!r} is not one of {', '.join(known)}")
    return [benchmark for name in names for benchmark in known[name]]


def run(names: Sequence[str], results: Path, more: Sequence[str]) -> None:
    """Run benchmarks one after the other; go on behind one that fails, and fail at the end."""
    results.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    failed = []
    for benchmark in chosen(names):
        print(f"== {benchmark.name}: {benchmark.shows}", flush=True)
        code = call(command(benchmark, results, more), environ)
        failed += [benchmark.name] if code else []
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def call(words: Sequence[str], environ: dict[str, str]) -> int:
    """Run a command and return its exit code; when interrupted, wait until it has cleaned up."""
    with subprocess.Popen(words, env=environ) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal told the child, too
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def draw(names: Sequence[str]) -> None:
    """Draw pictures, all of them if none is named, where the documents show them.

    Raises:
        SystemExit: If there is none of a name; the message has the names that there are.
    """
    from figures.drawing import draw as draw_picture
    from figures.picture import read_pictures

    pictures = {picture.name: picture for picture in read_pictures()}
    for name in names:
        if name not in pictures:
            raise SystemExit(f"picture {name!r} is not one of {', '.join(pictures)}")
    for name in names or pictures:
        draw_picture(pictures[name], pictures[name].path)
        print(pictures[name].path)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="say what there is")
    running = verbs.add_parser("run", help="run benchmarks; further arguments go to them")
    running.add_argument("names", nargs="+", help=f"names, or {' or '.join(GROUPS)}")
    running.add_argument("--results", type=Path, default=HERE / "results")
    reporting = verbs.add_parser("report", help="write a multi-model run's report again")
    reporting.add_argument("folder", type=Path)
    checking = verbs.add_parser("figures", help="compare the documents' figures with the records")
    checking.add_argument("--write", action="store_true", help="write the records' figures first")
    drawing = verbs.add_parser("draw", help="draw the documents' pictures from the records")
    drawing.add_argument("names", nargs="*", help="pictures; all of them if none is named")
    words = sys.argv[1:]
    more = words[words.index("--") + 1 :] if "--" in words else []
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if options.verb == "list":
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:18} {benchmark.where:5} {benchmark.shows}")
    elif options.verb == "run":
        run(options.names, options.results, more)
    elif options.verb == "figures":
        from figures.document import report

        found = report(write=options.write)
        raise SystemExit("\n".join(found) if found else 0)
    elif options.verb == "draw":
        draw(options.names)
    else:
        from multi_model.report import write_report

        write_report(options.folder)
        print(options.folder / "report.html")


if __name__ == "__main__":
    with printing("benchmarks"):
        main()
