"""The engines that we hook: their packages on the index, what we hook, and whether it fits."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvcached_patches import ray, sglang, vllm
from kvcached_patches.apply import Patcher
from kvcached_patches.hook import Finding, Hook, HookError
from kvcached_patches.options import Declarations
from kvcached_patches.policy import Installed, check_installed, find_installed, hooks_of, report

PLUGIN = "kvcached"


@dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
        title: Its name, as its makers write it.
        package: What it is imported as.
        oldest: For each package on the index, the oldest release that we serve.
        hooks: What we hook.
        locked: What we hook, and what else of it we lean on.
        plugins_variable: The variable that names the plugins which it may load.
        options: Where it declares its options; None: it is no engine.
    """

    title: str
    package: str
    oldest: dict[str, str]
    hooks: tuple[Hook, ...]
    locked: tuple[Hook, ...]
    plugins_variable: str
    options: Declarations | None = None

    def installed(self) -> Installed | None:
        """Return the release in this environment, or None."""
        return find_installed(self.oldest, self.package)

    def misfit(self, found: Installed | None) -> str:
        """Return why a release may not be hooked, or nothing if it may.

        It reads the engine's source files and imports none of them.

        Args:
            found: The release; None if there is none.
        """
        if found is None:
            return (
                f"no {self.title} is installed (looked for {' and '.join(self.oldest)}); install "
                "one into this environment, or unset ENABLE_KVCACHED"
            )
        findings = self.findings(found)
        return report(self.title, found, findings) if findings else ""

    def findings(self, installed: Installed) -> list[Finding]:
        """Return each reason why that release may not be hooked."""
        return check_installed(installed, self.locked)

    def apply(self, found: Installed, on_misfit: Callable[[HookError], None]) -> Patcher:
        """Hook a release that fits.

        Args:
            found: The release.
            on_misfit: Told when a hook turns out not to fit all the same; none is applied then.
        """
        patcher = Patcher(hooks_of(found, self.hooks), on_misfit=on_misfit)
        patcher.apply()
        return patcher

    def doctor_findings(self) -> Iterator[tuple[bool, str]]:
        """Yield what `kvcached doctor` says: whether it is good, and a text."""
        found = self.installed()
        if found is None:
            yield True, "not installed here"
            return
        misfit = self.misfit(found)
        yield not misfit, misfit or f"{found.release}, every hook fits"
        variable = self.plugins_variable
        plugins = os.environ.get(variable)
        if plugins is not None and PLUGIN not in plugins.split(","):
            yield (
                False,
                f"{variable}={plugins!r} keeps kvcached out; add {PLUGIN} to it or unset it",
            )


ENGINES = {
    "vllm": Engine(
        "vLLM",
        vllm.PACKAGE,
        vllm.OLDEST_RELEASES,
        vllm.HOOKS,
        vllm.LOCKED,
        "VLLM_PLUGINS",
        vllm.OPTIONS,
    ),
    "sglang": Engine(
        "SGLang",
        sglang.PACKAGE,
        sglang.OLDEST_RELEASES,
        sglang.HOOKS,
        sglang.LOCKED,
        "SGLANG_PLUGINS",
        sglang.OPTIONS,
    ),
}
# No engine, and nothing of it is hooked: what the application for many machines leans on.
RAY = Engine("Ray", ray.PACKAGE, ray.OLDEST_RELEASES, (), ray.LOCKED, "")
DISTRIBUTIONS = {
    distribution: engine for engine in (*ENGINES.values(), RAY) for distribution in engine.oldest
}
