"""The schedules of vLLM's own scheduler, without a model; run by vLLM's own Python.

`python tests/perf/vllm_schedule.py MODEL < CASES > SCHEDULES`, both JSON. A case has the settings and
turns; each turn lists the requests that arrive before it: [id, prompt tokens, output tokens,
priority, shared parts, text]; what those are, `tidegate.sim.types.Request` says. What comes back is, turn
by turn, what is launched (tokens by request, who was preempted) and who finished.
"""

import json
import os
import sys
import zlib
from collections import deque

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager


class Core:
    """The part of vLLM's engine core that calls the scheduler; what a step samples is next in the text."""

    def __init__(self, model: str, settings: dict) -> None:
        config = EngineArgs(
            model=model,
            max_model_len=4096,
            max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=settings["max_num_batched_tokens"],
            block_size=settings["block_size"],
            scheduling_policy=settings["policy"],
            enable_prefix_caching=settings["enable_prefix_caching"],
        ).create_engine_config()
        asynchronous = settings["async_scheduling"]
        # The CPU's platform turns it off; the scheduler itself knows no platform.
        config.scheduler_config.async_scheduling = asynchronous
        config.cache_config.num_gpu_blocks = settings["num_blocks"]
        spec = FullAttentionSpec(
            block_size=settings["block_size"], num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        blocks = KVCacheConfig(settings["num_blocks"], [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            config, blocks, StructuredOutputManager(config), settings["block_size"]
        )
        self.depth = 2 if asynchronous else 1
        self.launched: deque = deque()
        self.arrived = 0
        self.texts: dict = {}
        self.hasher = None
        if settings["enable_prefix_caching"]:
            init_none_hash(sha256)
            self.hasher = get_request_block_hasher(settings["block_size"], sha256)

    def add(self, name: str, prompt: int, output: int, priority: int, shared: list, text: str) -> None:
        """A request, later than those before it."""
        self.arrived += 1
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        params.update_from_generation_config({}, 2)
        self.texts[name] = (shared, text or f"own {name}")
        self.scheduler.add_request(
            Request(
                name,
                [self.token(name, at) for at in range(prompt)],
                params,
                None,
                arrival_time=float(self.arrived),
                priority=priority,
                block_hasher=self.hasher,
            )
        )

    def token(self, name: str, at: int) -> int:
        """The token at a place of a request's text."""
        shared, rest = self.texts[name]
        for part, tokens in shared:
            if at < tokens:
                return zlib.crc32(f"{part}/{at}".encode())
            at -= tokens
        return zlib.crc32(f"{rest}/{at}".encode())

    def turn(self) -> dict:
        """Launch until the pipeline is full, then take the oldest step's results: `EngineCore.step…`."""
        told: dict = {"launched": [], "finished": []}
        while True:
            if self.scheduler.has_requests():
                step = self.scheduler.schedule()
                if step.num_scheduled_tokens:
                    told["launched"].append(step.num_scheduled_tokens)
                self.launched.append(step)
                full = len(self.launched) == self.depth
                if not full and (step.num_scheduled_tokens or self.scheduler.has_requests()):
                    continue
            elif not self.launched:
                return told
            step = self.launched.popleft()
            ended = self.results(step)
            if step.num_scheduled_tokens:
                told["finished"] = ended
                return told

    def results(self, step) -> list[str]:
        """Give the scheduler what a model would; who has finished with it."""
        names = list(step.num_scheduled_tokens)
        requests = self.scheduler.requests
        before = set(requests)
        sampled = [self.sampled(step, name) for name in names]
        answer = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)
        self.scheduler.update_from_output(step, answer)
        return sorted(before - set(requests))

    def sampled(self, step, name: str) -> list[int]:
        """The token that a step makes of a request; none where it ends before the last one that is known."""
        for new in step.scheduled_new_reqs:
            if new.req_id == name:
                end = new.num_computed_tokens + step.num_scheduled_tokens[name]
                return [] if end < len(new.prompt_token_ids) else [self.token(name, end)]
        cached = step.scheduled_cached_reqs
        at = cached.req_ids.index(name)
        request = self.scheduler.requests.get(name)
        known = request.num_prompt_tokens + cached.num_output_tokens[at] if request else 0
        end = cached.num_computed_tokens[at] + step.num_scheduled_tokens[name]
        return [] if end < known else [self.token(name, end)]


def main(model: str) -> None:
    """All cases."""
    schedules = []
    for case in json.load(sys.stdin):
        core = Core(model, case["settings"])
        turns = []
        for arrivals in case["turns"]:
            for arrival in arrivals:
                core.add(*arrival)
            turns.append(core.turn())
        schedules.append(turns)
    print("\n" + json.dumps(schedules), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
