"""Retrieval: an embedder finds passages, a reranker orders them, a writer answers from them."""

from operator import mul
from pathlib import Path

import httpx
from openai import OpenAI

from kvcached_demo.harness.way import Gateway, run

PASSAGES = (
    "An engine takes the memory of its whole KV cache when it starts.",
    "A page backs a few blocks in all layers at once.",
    "When a burst ends, blocks are given back.",
    "Engines on one device share what is free.",
)
QUESTION = "Where does the memory go when a burst ends?"
NUM_FOUND, NUM_KEPT = 3, 2


def show(gateway: Gateway) -> None:
    """Answer a question from the passages that fit it best."""
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=600) as client:
        texts = [QUESTION, *PASSAGES]
        data = client.embeddings.create(model="embedder", input=texts, encoding_format="float").data
        question, *vectors = [each.embedding for each in data]
        likeness = {
            passage: sum(map(mul, question, vector))
            for passage, vector in zip(PASSAGES, vectors, strict=True)
        }
        found = sorted(PASSAGES, key=likeness.__getitem__, reverse=True)[:NUM_FOUND]
        print(f"embedder: {len(vectors)} passages, the {NUM_FOUND} nearest are kept")

        body = {"model": "reranker", "query": QUESTION, "documents": found}
        answer = httpx.post(f"{gateway.url}/v1/rerank", json=body, timeout=600).raise_for_status()
        kept = [found[result["index"]] for result in answer.json()["results"]][:NUM_KEPT]
        print(f"reranker: {len(answer.json()['results'])} scores, the {NUM_KEPT} best are kept")

        prompt = "\n".join([*kept, QUESTION])
        said = client.chat.completions.create(
            model="writer", max_tokens=32, messages=[{"role": "user", "content": prompt}]
        )
        print(f"writer: {said.usage.completion_tokens if said.usage else 0} tokens of an answer")


if __name__ == "__main__":
    raise SystemExit(run(show, Path(__file__).parent))
