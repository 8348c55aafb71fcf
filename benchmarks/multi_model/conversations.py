"""Schedules of prompts that grow: conversations that come back, and agents that fan out.

A request names its conversation. The client then takes the prompt from one stream of tokens, so a
longer prompt begins with the shorter one before it, and a prefix cache can hit. What a model
answered is not in the next prompt: that has tokens of the stream in its place.
"""

import random

from multi_model.workloads import Request, Workload, ordered

# A conversation begins with so many tokens, and each turn adds so many to the prompt.
FIRST_TOKENS, TURN_TOKENS = 512, 256
MAX_TURNS = 8
ANSWER_TOKENS = 128
# How long a person reads and thinks, on average, from one request to the next.
PAUSE_SECONDS = 15.0
# An agent asks so many things at once, then so long later the next model.
FAN_OUT = 4
STEP_SECONDS = 3.0
NUM_AGENT_MODELS = 3


def returning(
    num_conversations: int, *, num_models: int, seconds: float, scale: float = 1.0, seed: int = 0
) -> Workload:
    """Return conversations that come back after a pause, with all that was said in the prompt.

    Args:
        num_conversations: How many each model has open at a time; one that has had its turns is
            followed by a new one.
        num_models: How many models there are.
        seconds: How long requests come.
        scale: Of the numbers of tokens; a small model's context holds less.
        seed: Of the pauses.
    """
    requests = []
    for model in range(num_models):
        for place in range(num_conversations):
            draws = random.Random(f"{seed} {model} {place}")
            at_seconds = draws.uniform(0, PAUSE_SECONDS)
            step = 0
            while at_seconds < seconds:
                number, turn = divmod(step, MAX_TURNS)
                name = f"{model} {place} {number}"
                num_in = _tokens(FIRST_TOKENS + turn * TURN_TOKENS, scale)
                num_out = _tokens(ANSWER_TOKENS, scale)
                requests.append(Request(at_seconds, model, num_in, num_out, name, turn))
                at_seconds += draws.expovariate(1 / PAUSE_SECONDS)
                step += 1
    return ordered(f"returning {num_conversations} each", num_models, requests)


def agents(
    num_agents: int, *, num_models: int, seconds: float, scale: float = 1.0, seed: int = 0
) -> Workload:
    """Return bursts of agents that ask three models in turn, several requests at once.

    The requests of a burst have one beginning, which is what the agent knows by then.

    Args:
        num_agents: How many agents work at the same time; each begins at a moment of its own.
        num_models: How many models there are; an agent takes three of them, or all.
        seconds: How long bursts begin.
        scale: Of the numbers of tokens.
        seed: Of the beginnings and of which models an agent takes.
    """
    requests = []
    for agent in range(num_agents):
        draws = random.Random(f"{seed} {agent}")
        models = draws.sample(range(num_models), min(NUM_AGENT_MODELS, num_models))
        at_seconds = draws.uniform(0, STEP_SECONDS * len(models))
        step = 0
        while at_seconds < seconds:
            task, turn = divmod(step, MAX_TURNS)
            num_in = _tokens(FIRST_TOKENS + turn * TURN_TOKENS, scale)
            model = models[step % len(models)]
            requests += [
                Request(at_seconds, model, num_in + call, _tokens(ANSWER_TOKENS, scale),
                        f"{agent} {task}")
                for call in range(FAN_OUT)
            ]  # fmt: skip
            at_seconds += STEP_SECONDS
            step += 1
    return ordered(f"agents {num_agents}", num_models, requests)


def _tokens(num: int, scale: float) -> int:
    return max(int(num * scale), 1)
