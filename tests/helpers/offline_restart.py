"""Run as a script: one vLLM engine in this process, which answers once host memory has its weights.

Arguments: a folder, of which nothing is read, and a JSON object, which has that of the `model`.
"""

import json
import sys

from offline_weights import OPTIONS, PROMPTS

from helpers.waiting import await_that


def main() -> None:
    """Start, answer, have a copy, and report the tokens on the last line."""
    from vllm import LLM, SamplingParams

    from kvcached_vllm.elastic_weights import weight_status

    llm = LLM(json.loads(sys.argv[2])["model"], dtype="float32", **OPTIONS)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    tokens = [
        list(output.outputs[0].token_ids)
        for output in llm.generate(prompts, sampling, use_tqdm=False)
    ]
    await_that(lambda: llm.collective_rpc(weight_status)[0].is_copied)
    print(json.dumps({"tokens": tokens}))


if __name__ == "__main__":
    main()
