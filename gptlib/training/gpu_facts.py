"""What is published about GPUs: memory, links, peak FLOP/s, and the utilization others reached.
Every figure has its source.
"""

import re
from dataclasses import dataclass, replace

from gptlib.common import UserError
from gptlib.runtime import device_name

DATASHEET = "the maker's datasheet"
NCCL_212 = "github.com/NVIDIA/nccl-tests/issues/212"
NCCL_228 = "github.com/NVIDIA/nccl-tests/issues/228"
NCCL_290 = "github.com/NVIDIA/nccl-tests/issues/290"
LLM_FOUNDRY = "llm-foundry's benchmarks (FSDP, T = 2048, scripts/train/benchmarking/README.md)"
GPUS_PER_HOST = 8

# The share of a GPU's memory that tensors can have. The CUDA context, NCCL's buffers and what the
# allocator cannot reuse take the rest. An assumption.
USABLE_MEMORY = 0.93

# Dense bf16 TFLOP/s (float16 if there is no bf16), from the makers' datasheets.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H200 NVL": 835, "H100": 989, "H100 PCIe": 756,
    "H100 NVL": 835, "A100": 312, "A100 PCIe": 312, "L40S": 362, "L40": 181, "L4": 121,
    "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "V100 PCIe": 112,
    "T4": 65,
}

# words in the names of GPUs that do not tell one from another
MAKERS_AND_SOCKETS = re.compile(r"nvidia|geforce|tesla|rtx|sxm\d*|hbm\d*e?|gpu")


@dataclass(frozen=True)
class GPU:
    """memory: GiB. link, network: bytes a second that a GPU sends at most in a collective, to the
    others of its host and to other hosts. source: where these two come from.
    """
    name: str
    memory: float
    link: float
    network: float
    source: str

    @property
    def peak(self):
        """Dense 16-bit FLOP/s."""
        return PEAK_TFLOPS[self.model] * 1e12

    @property
    def model(self):
        """The name without the memory."""
        return self.name.removesuffix(" 40GB")

    @property
    def float32_peak(self):
        """FLOP/s in float32: half of those in 16 bits with TF32 products, an eighth without."""
        return self.peak / (8 if self.name in ("V100", "T4") else 2)

    @property
    def usable_bytes(self):
        return self.memory * 2**30 * USABLE_MEMORY


def nvlink(name, memory, line_rate, network):
    """A GPU with known line rates of its links. NCCL reaches 82 % of them on an H100."""
    return GPU(name, memory, 0.82 * line_rate * 1e9, 0.94 * network * 1e9,
               f"82 % and 94 % of the line rates, as measured on H100 ({NCCL_212}, {NCCL_290})")


def pcie(name, memory, line_rate):
    """A GPU without NVLink. Assumed: half the line rate of its slot, 100 Gbit/s for each host."""
    return GPU(name, memory, 0.5 * line_rate * 1e9, 0.94 * 12.5e9 / GPUS_PER_HOST,
               "assumed: half of PCIe's line rate, 100 Gbit/s between hosts")


# The network is one adapter for each GPU: 400 Gbit/s from the H100 on, 200 with an A100 (as in
# NVIDIA's DGX systems), 100 with a V100.
GPUS = {gpu.name: gpu for gpu in (
    nvlink("B200", 180, 900, 50),
    GPU("H200", 141, 370e9, 47e9, f"as H100 ({NCCL_212}, {NCCL_290})"),
    GPU("H100", 80, 370e9, 47e9, f"{NCCL_212}; {NCCL_290}"),
    pcie("H100 PCIe", 80, 64),
    GPU("A100", 80, 220e9, 23.5e9, f"{NCCL_228}; 94 % of 200 Gbit/s"),
    GPU("A100 40GB", 40, 220e9, 23.5e9, f"{NCCL_228}; 94 % of 200 Gbit/s"),
    pcie("A100 PCIe", 80, 32),
    nvlink("V100", 32, 150, 12.5),
    pcie("L40S", 48, 32), pcie("L4", 24, 32), pcie("A10G", 24, 32), pcie("A10", 24, 32),
    pcie("RTX 4090", 24, 32), pcie("RTX 3090", 24, 32), pcie("T4", 16, 16),
)}


@dataclass(frozen=True)
class MeasuredMFU:
    """The FLOPs utilization that someone reached: model FLOPs (PaLM's formula) over the datasheet's
    peak. recomputed: whether activations were recomputed, which the model's FLOPs don't count.
    """
    gpu: str
    parameters: float
    mfu: float
    recomputed: bool
    source: str


def llm_foundry(gpu, *rows):
    """Rows (parameters, MFU in percent, number of GPUs, recomputed) of llm-foundry's tables."""
    return [MeasuredMFU(gpu, parameters, percent / 100, recomputed, f"{n} x {gpu}, {LLM_FOUNDRY}")
            for parameters, percent, n, recomputed in rows]


MEASURED_MFU = [
    *llm_foundry("A100", (125e6, 44.79, 8, False), (356e6, 51.62, 8, False),
                 (760e6, 56.85, 8, False), (1.32e9, 59.86, 8, False), (2.65e9, 62.11, 8, False),
                 (6.66e9, 64.23, 8, False), (12.9e9, 59.57, 8, False), (30e9, 55.3, 8, True),
                 (64.9e9, 53.33, 64, True)),
    *llm_foundry("H100", (760e6, 37.57, 32, False), (1.32e9, 41.82, 8, False),
                 (2.65e9, 43.73, 16, False), (6.66e9, 46.44, 8, False), (12.9e9, 39.79, 8, False),
                 (30e9, 43.07, 16, True), (64.9e9, 42.57, 64, True)),
    # 485,960 tokens a second at 855 MFLOP
    MeasuredMFU("H100", 124e6, 0.42, False, "1 x H100, measured with this repository on "
                "2026-11-27 (docs/gpu.md)"),
    # it prints 29 % of an A100's 312 TFLOP/s
    MeasuredMFU("RTX 4090", 124e6, 0.55, False, "nanoGPT on 1 x RTX 4090, 29 % of A100's peak "
                "(github.com/karpathy/nanoGPT/issues/182)"),
]

SIMILAR = {"H200": "H100", "B200": "H100", "H100 PCIe": "H100", "RTX 3090": "RTX 4090"}


def find_gpu(name):
    """The GPU of a name in any spelling, such as H100, rtx4090 or NVIDIA A100-SXM4-40GB.

    If the name has a memory size, the GPU gets it. Raises UserError for an unknown name.
    """
    model, memory = split_name(name)
    candidates = [gpu for gpu in GPUS.values() if split_name(gpu.model)[0] == model]
    if not candidates:
        raise UserError(f"--gpu is {name!r}: choose one of {', '.join(GPUS)}, or leave it out to "
                        "measure this machine")
    same_memory = [gpu for gpu in candidates if gpu.memory == memory]
    gpu = (same_memory or candidates)[0]
    return gpu if memory in (None, gpu.memory) else replace(gpu, memory=memory)


def split_name(name):
    """(model, GiB or None) of a GPU's name: "NVIDIA A100-SXM4-40GB" is ("a100", 40)."""
    text = name.lower().replace("_", " ")
    memory = re.search(r"(\d+) ?gi?b", text)
    if memory:
        text = text.replace(memory[0], " ")
    words = re.findall(r"[a-z0-9]+", text)
    words = [word for word in words if not MAKERS_AND_SOCKETS.fullmatch(word)]
    return "".join(words).removeprefix("rtx"), int(memory[1]) if memory else None


def peak_flops(device):
    """FLOP/s of the device by its datasheet, or None if it is not known."""
    model, _ = split_name(device_name(device))
    known = {split_name(name)[0]: tflops * 1e12 for name, tflops in PEAK_TFLOPS.items()}
    return known.get(model)


def published_mfu(gpu, parameters, recompute):
    """(MFU, its source in words) of the model nearest in size, on that GPU or a similar one.

    Recomputing all activations is one more forward pass: 8 FLOPs for each weight instead of 6.
    """
    rows = [row for row in MEASURED_MFU if row.gpu == gpu.model]
    note = ""
    if not rows:
        similar = SIMILAR.get(gpu.name, "A100")
        rows = [row for row in MEASURED_MFU if row.gpu == similar]
        note = f"nothing published was found for {gpu.name}; assumed as "
    nearest = min(rows, key=lambda row: max(row.parameters / parameters,
                                            parameters / row.parameters))
    mfu = nearest.mfu
    size = f"{nearest.parameters / 1e6:,.0f}M parameters on "
    source = note + size + nearest.source
    if recompute and not nearest.recomputed:
        mfu, source = mfu * 6 / 8, source + "; times 6/8 for recomputing"
    if nearest.recomputed and not recompute:
        mfu, source = mfu * 8 / 6, source + "; it recomputed activations, times 8/6 without"
    return mfu, source
