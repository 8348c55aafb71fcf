"""A fine-tuning job beside inference; then its result is asked under a name of its own."""

import subprocess
import sys
from pathlib import Path

from openai import OpenAI

from kvcached_demo.harness.way import Gateway, run

HERE = Path(__file__).parent
PROMPT = "memory follows"


def ask(client: OpenAI, model: str) -> str:
    """Ask a model to go on."""
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    return answer.choices[0].text


def show(gateway: Gateway) -> None:
    """Answer requests while a job runs, with less memory, and then ask what came of the job."""
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=600) as client:
        before = ask(client, "writer")
        print(f"writer goes on with {before!r}")
        gateway.command("limit", "writer", "24MiB")  # the rest is the job's
        base = gateway.folder.parent / "tiny" / "one"
        job = subprocess.Popen([sys.executable, HERE / "train.py", base, gateway.folder / "tuned"])
        num_answers = 0
        while job.poll() is None:
            if ask(client, "writer") != before:
                raise SystemExit("writer changed while another model was trained")
            num_answers += 1
        if job.returncode:
            raise SystemExit(f"the job ended with {job.returncode}")
        gateway.command("limit", "writer", "none")
        print(f"{num_answers} answers while the job ran")
        print(f"tuned goes on with {ask(client, 'tuned')!r}")


if __name__ == "__main__":
    raise SystemExit(run(show, HERE))
