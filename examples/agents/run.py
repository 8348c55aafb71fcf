"""Three agents take turns; the memory holds the weights of one, and goes to who works."""

from pathlib import Path

from openai import OpenAI

from kvcached_demo.harness.way import Gateway, run

AGENTS = {
    "planner": "Plan the next change.",
    "coder": "Write it.",
    "reviewer": "Say what is wrong with it.",
}
NUM_ROUNDS = 3


def show(gateway: Gateway) -> None:
    """Let each agent go on from what the one before it said."""
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=600) as client:
        said = "memory follows the load"
        for number in range(NUM_ROUNDS):
            for agent, task in AGENTS.items():
                answer = client.chat.completions.with_raw_response.create(
                    model=agent,
                    max_tokens=16,
                    messages=[
                        {"role": "system", "content": task},
                        {"role": "user", "content": said},
                    ],
                )
                said = answer.parse().choices[0].message.content or ""
                begun = answer.headers["x-kvcached-cold-start"]
                print(f"round {number + 1}: {agent:9} had to begin with: {begun}")
        for agent, model in gateway.models().items():
            print(f"{agent:9} is {model['state']}")


if __name__ == "__main__":
    raise SystemExit(run(show, Path(__file__).parent))
