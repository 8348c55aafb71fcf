"""Every benchmark: what it shows and how it is run. Scripts and their arguments, as data."""

from dataclasses import dataclass

HOST, GPU, TWO_GPUS = "host", "GPU", "two GPUs"


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder.

    Attributes:
        name: What `run` is told.
        script: Its path in this folder.
        where: `host`, `GPU` or `two GPUs`.
        shows: What it measures.
        arguments: What it is started with, before what the caller adds.
        output: The argument that names where results go.
        result: The result's name in the results folder.
    """

    name: str
    script: str
    where: str
    shows: str
    arguments: tuple[str, ...] = ()
    output: str = "--json"
    result: str = ""

    @property
    def result_name(self) -> str:
        """The file or folder of its results."""
        return self.result or f"{self.name}.json"


BENCHMARKS = (
    Benchmark("block_pool", "block_pool.py", HOST, "vLLM's block pool and ours, call by call"),
    Benchmark(
        "scheduler_path",
        "scheduler_path.py",
        HOST,
        "calls and schedules beside older code",
    ),
    Benchmark("wrappers", "wrappers.py", HOST, "what our wrappers add to the scheduler's path"),
    Benchmark("step_calls", "step_calls.py", HOST, "how many calls a step of vLLM makes with us"),
    Benchmark("lock_check", "lock_check.py", HOST, "comparing an engine with its lock at a start"),
    Benchmark("ledger", "ledger.py", HOST, "one operation of the ledger, alone and contended"),
    Benchmark("pressure", "pressure.py", HOST, "how soon an idle engine gives memory back"),
    Benchmark("host_memory", "host_memory.py", HOST, "mapping host memory, ledger views, imports"),
    Benchmark(
        "gateway_overhead",
        "gateway_overhead.py",
        HOST,
        "what the gateway adds to a request, beside LiteLLM's proxy",
    ),
    Benchmark(
        "ray_overhead",
        "ray_overhead.py",
        HOST,
        "what the application for Ray adds to a request, above a bare one that streams",
    ),
    Benchmark(
        "gateway_policy",
        "gateway_policy.py",
        HOST,
        "the gateway's decisions of one tick, over 100 models",
    ),
    Benchmark(
        "gateway_lifecycle",
        "gateway_lifecycle.py",
        HOST,
        "adopting four engines, and the gateway's share of a wake",
    ),
    Benchmark(
        "scale_simulation",
        "scale_simulation.py",
        HOST,
        "the gateway's policy over 1,000 devices and 10,000 models, for a simulated day",
    ),
    Benchmark("cpu_throughput", "cpu_throughput.py", HOST, "the CPU engine's throughput with us"),
    Benchmark("dry_pool", "dry_pool.py", HOST, "ten minutes in which all want more than there is"),
    Benchmark(
        "fair_pool",
        "fair_pool.py",
        HOST,
        "two equal servers on a pool too small for both",
        result="fair_pool_sglang.json",
    ),
    Benchmark(
        "equal_schedulers",
        "equal_schedulers.py",
        HOST,
        "two equally busy schedulers on one pool, beside halves of it, in virtual time",
    ),
    Benchmark(
        "ramp_schedulers",
        "ramp_schedulers.py",
        HOST,
        "three schedulers that all ask at once, on one pool and with a third each, in virtual time",
    ),
    Benchmark(
        "equal_servers",
        "equal_servers.py",
        HOST,
        "two equally busy vLLM servers on one pool, beside halves of it",
    ),
    Benchmark(
        "offload_race",
        "offload_race.py",
        HOST,
        "copies to the host against memory that goes: 500 requests, with holds and without",
    ),
    Benchmark(
        "host_pages",
        "host_pages.py",
        HOST,
        "taking pages of shared host memory, passing them on, and files on the same memory",
    ),
    Benchmark(
        "disk_images",
        "disk_images.py",
        HOST,
        "an image of weights from a disk beside plain reads, and 30 models in memory for 10",
    ),
    Benchmark("clients", "clients.py", HOST, "what our client and vLLM's add to a server's times"),
    Benchmark(
        "multi_model_host",
        "multi_model/run.py",
        HOST,
        "several models on one pool, mode by mode: a rehearsal, its times prove nothing",
        ("--profile", "host", "--cross-check", "1"),
        output="--out",
        result="multi_model/host",
    ),
    Benchmark("vmm", "vmm.py", GPU, "the driver's costs by the size of a handle"),
    Benchmark("attention", "attention.py", GPU, "attention over scattered pages"),
    Benchmark("vllm_steps", "vllm_steps.py", GPU, "a step of vLLM with us and without"),
    Benchmark("vllm_overhead", "vllm_overhead.py", GPU, "vLLM's servers with us and without"),
    Benchmark("sglang_overhead", "sglang_overhead.py", GPU, "SGLang's servers with us and without"),
    Benchmark("beside_sglang", "beside_sglang.py", GPU, "vLLM beside SGLang, and one killed"),
    Benchmark(
        "weights_many", "weights_many.py", GPU, "more models than fit, and their weights in turn"
    ),
    Benchmark(
        "replica_wake",
        "replica_wake.py",
        TWO_GPUS,
        "a sleeping model whose replica is on the GPU beside",
    ),
    Benchmark(
        "weights_ranks",
        "weights_ranks.py",
        TWO_GPUS,
        "a model over several GPUs that yields, and what their links share",
    ),
    Benchmark(
        "restart", "restart.py", GPU, "a start from the host copy beside one from cached files"
    ),
    Benchmark(
        "gateway_gpu",
        "gateway_gpu.py",
        GPU,
        "more models than fit behind one URL: bursts, and classes with goals",
    ),
    Benchmark(
        "gateway_through",
        "gateway_through.py",
        GPU,
        "a busy engine through the gateway, beside the engine asked directly",
    ),
    Benchmark(
        "gateway_activation",
        "gateway_activation.py",
        GPU,
        "a model whose weights are gone: through the gateway, beside its server asked directly",
    ),
    Benchmark("weights_wake", "weights_wake.py", GPU, "weights that come and go, and their wake"),
    Benchmark(
        "prefill_while_copying",
        "prefill_while_copying.py",
        GPU,
        "a long prompt to a model whose weights are gone, computed while they come",
    ),
    Benchmark(
        "small_copies",
        "small_copies.py",
        GPU,
        "how long a few bytes wait for the device while weights are copied to it",
    ),
    Benchmark(
        "map_beside_copies",
        "map_beside_copies.py",
        GPU,
        "how long a driver takes to map memory, alone and beside copies of weights",
    ),
    Benchmark(
        "layers_while_copying",
        "layers_while_copying.py",
        GPU,
        "layers that wait for their pages while these are copied, by the device's own clock",
    ),
    Benchmark(
        "watched_prefill",
        "watched_prefill.py",
        GPU,
        "what each layer of an engine waits for while its weights come, by the device's own clock",
    ),
    Benchmark(
        "replica_copy",
        "replica_copy.py",
        TWO_GPUS,
        "weights copied to a second GPU out of another process' memory",
    ),
    Benchmark("held", "held.py", GPU, "what a server whose weights are gone still holds"),
    Benchmark(
        "programs",
        "programs.py",
        GPU,
        "room for a program that allocates 20 GiB, beside two servers that fill the device",
    ),
    Benchmark(
        "wake_beside_neighbour",
        "wake_beside_neighbour.py",
        GPU,
        "sleeping, and waking beside a neighbour that filled the device",
    ),
    Benchmark(
        "sglang_wake",
        "sglang_wake.py",
        GPU,
        "SGLang's memory saver beside a neighbour that fills the device: 20 rounds",
        output="--out",
        result="sglang_wake",
    ),
    Benchmark(
        "offload",
        "offload.py",
        GPU,
        "vLLM's own offloading with us and without: speed, copies, what comes back",
    ),
    Benchmark(
        "offload_two_ranks",
        "offload.py",
        TWO_GPUS,
        "vLLM's own offloading with a model on two GPUs: vanilla's tokens, and after it came back",
        ("--rows", "tokens", "--ranks", "2"),
    ),
    Benchmark(
        "offload_soak",
        "offload_soak.py",
        GPU,
        "half an hour of copies to the host, aborts, and a neighbour that asks every 200 ms",
    ),
    Benchmark(
        "offload_contexts",
        "offload_contexts.py",
        GPU,
        "contexts of four times the device's KV memory, with a host tier and without",
    ),
    Benchmark(
        "offload_disk",
        "offload.py",
        GPU,
        "vLLM's tier on disk: a long prompt from files alone, beside the disk's own speed",
        ("--rows", "disk", "--disk", "offloaded-blocks"),
    ),
    Benchmark(
        "hicache",
        "offload.py",
        GPU,
        "SGLang's HiCache with us and without: answers, speed, what comes back",
        ("--engine", "sglang"),
    ),
    Benchmark(
        "busy_neighbours",
        "busy_neighbours.py",
        GPU,
        "two models that compute at the same time: how each slows the other, with MPS and without",
    ),
    Benchmark("vllm_neighbours", "vllm_neighbours.py", GPU, "starts and bursts beside neighbours"),
    Benchmark(
        "pressure_gpu",
        "pressure.py",
        GPU,
        "how soon an idle engine gives memory back",
        ("--gpu",),
    ),
    Benchmark(
        "dry_pool_gpu",
        "dry_pool.py",
        GPU,
        "five minutes in which all want more than there is",
        ("--gpu", "--seconds", "300"),
    ),
    Benchmark(
        "multi_model",
        "multi_model/run.py",
        GPU,
        "three 8B models, mode by mode, memory the bottleneck: the headline figures",
        ("--profile", "gpu", "--pool-gib", "8", "--cross-check", "4", "12"),
        output="--out",
        result="multi_model/gpu",
    ),
    Benchmark(
        "multi_model_many",
        "multi_model/run.py",
        GPU,
        "four and eight 1B models under a chat arena's log: models per GPU",
        (
            *("--profile", "gpu", "--shape", "llama-1b", "--pool-gib", "0.625"),
            *("--num-models", "4", "8", "--workloads", "arena:5", "--seconds", "30"),
            *("--server-options", "--max-model-len 2048", "--page-bytes", "2MiB"),
        ),
        output="--out",
        result="multi_model/many",
    ),
    Benchmark(
        "multi_model_offload",
        "multi_model/run.py",
        GPU,
        "eight 1B models whose conversations come back, with a host tier and without",
        (
            *("--profile", "gpu", "--shape", "llama-1b", "--pool-gib", "2", "--num-models", "8"),
            *("--caching", "--tier-gib", "4", "--modes", "elastic", "offload"),
            *("--workloads", "returning:16", "--seconds", "480", "--page-bytes", "2MiB"),
        ),
        output="--out",
        result="multi_model/offload",
    ),
    Benchmark(
        "multi_model_twelve",
        "multi_model/run.py",
        GPU,
        "twelve 8B models on 80 GB, weights in the budget: ours beside sleep mode and swapping",
        (
            *("--profile", "gpu", "--cap-gib", "74.5", "--num-models", "12", "--seconds", "300"),
            *("--modes", "alone", "sleep-swap", "swap", "gateway", "--twice", "gateway"),
            *("--workloads", "arena:0.15", "--swap-limit", "256", "--alone-models", "2"),
        ),
        output="--out",
        result="multi_model/twelve",
    ),
    Benchmark(
        "multi_model_serverless",
        "multi_model/run.py",
        GPU,
        "sixteen models of 1B to 8B on 80 GB, each asked now and then",
        (
            *("--profile", "gpu", "--cap-gib", "74.5", "--num-models", "16"),
            *("--shape", "llama-1b", "llama-3b", "llama-8b", "--modes", "gateway"),
            *("--workloads", "serverless:1", "--seconds", "1000"),
            *("--bars", "serverless:1/p99_ttft<=1500"),
        ),
        output="--out",
        result="multi_model/serverless",
    ),
    Benchmark(
        "multi_model_upstream",
        "multi_model/run.py",
        GPU,
        "three 8B models on 80 GB: an even split, ovg-project's kvcached, and ours",
        (
            *("--profile", "gpu", "--cap-gib", "74.5", "--workloads", "ramp:24", "ramp:32"),
            *("--modes", "alone", "static", "upstream", "elastic", "--twice", "elastic"),
        ),
        output="--out",
        result="multi_model/upstream",
    ),
)
