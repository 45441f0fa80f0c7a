"""What the recipes for model families cost on H100s, worked out and not measured: the arithmetic of docs/recipes.md.

python benchmarks/recipe_cost.py
"""

from __future__ import annotations

from typing import NamedTuple

# Sustained rates of one H100, of 989 and 67 TFLOP/s that its data sheet gives for dense bf16 and float32.
BF16, FLOAT32 = 400e12, 40e12
OVERHEAD = (
    0.27  # seconds a linear, small products launched one by one: 57 s for SmolLM2-135M's 210 (one_shot_h200.json)
)
CALIBRATION = 128 * 2048
RECOVERY = 100_000_000


class Shape(NamedTuple):
    """A decoder: its hidden size, MLP, layers, widths of queries and of keys, vocabulary, whether the head is tied."""

    hidden: int
    mlp: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of the linears of a block."""
        h, m = self.hidden, self.mlp
        return [(self.queries, h), (self.keys, h), (self.keys, h), (h, self.queries), (m, h), (m, h), (h, m)]

    @property
    def inputs(self) -> list[int]:
        """Width of each distinct input of a block: q, k and v share one, gate and up another."""
        return [self.hidden, self.queries, self.hidden, self.mlp]

    @property
    def in_blocks(self) -> int:
        """Parameters in the blocks' linears."""
        return self.layers * sum(out * columns for out, columns in self.linears)

    @property
    def parameters(self) -> int:
        """All of them, norms left out."""
        return self.in_blocks + self.vocabulary * self.hidden * (1 if self.tied else 2)


MODELS = {
    "llama3": Shape(4096, 14336, 32, 4096, 1024, 128256, False),  # Llama-3.1-8B-Instruct
    "qwen3": Shape(4096, 12288, 36, 4096, 1024, 151936, False),  # Qwen3-8B
    "mistral": Shape(4096, 14336, 32, 4096, 1024, 32768, False),  # Mistral-7B-Instruct-v0.3
    "gemma3": Shape(1152, 6912, 26, 1024, 256, 262144, True),  # gemma-3-1b-it
    "smollm2": Shape(2048, 8192, 24, 2048, 2048, 49152, True),  # SmolLM2-1.7B-Instruct
}


def forward(shape: Shape, tokens: int) -> float:
    """Seconds of one pass through the blocks."""
    return 2 * shape.in_blocks * tokens / BF16


def hessians(shape: Shape) -> float:
    """Seconds of the lower triangle of every input's Hessian."""
    return shape.layers * sum(columns**2 for columns in shape.inputs) * CALIBRATION / FLOAT32


def admm(shape: Shape) -> float:
    """Seconds: per linear 16 x 2 steps and 10 of conjugate gradients, per input 16 inverses of 2 in^3."""
    steps = sum(2 * out * columns**2 * (16 * 2 + 10) for out, columns in shape.linears)
    inverses = sum(16 * 2 * columns**3 for columns in shape.inputs)
    return shape.layers * ((steps + inverses) / FLOAT32 + OVERHEAD * len(shape.linears))


def gptq(shape: Shape) -> float:
    """Seconds: a factor of in^3 per input, and the columns, out x in^2, per linear."""
    work = sum(out * columns**2 for out, columns in shape.linears) + sum(columns**3 for columns in shape.inputs)
    return shape.layers * (work / FLOAT32 + OVERHEAD * len(shape.linears))


def one_shot(shape: Shape) -> float:
    """Hours: permute and prune read the text once each, reconstruction trains five epochs in float32."""
    search = shape.layers * OVERHEAD * len(shape.linears)
    reconstruct = 5 * 6 * shape.in_blocks * CALIBRATION / FLOAT32 + forward(shape, CALIBRATION)
    return (2 * forward(shape, CALIBRATION) + search + hessians(shape) + admm(shape) + reconstruct) / 3600


def recovery(shape: Shape) -> float:
    """Hours: ADMM, then a student's forward and backward and a teacher's forward, 8 flops a parameter and token."""
    prune = 2 * forward(shape, CALIBRATION) + hessians(shape) + admm(shape)
    return (prune + 8 * shape.parameters * RECOVERY / BF16) / 3600


def throughput(shape: Shape) -> float:
    """Hours: ADMM, then GPTQ."""
    each = 2 * forward(shape, CALIBRATION) + hessians(shape)
    return (2 * each + admm(shape) + gptq(shape)) / 3600


def memory(shape: Shape, hidden_streams: int) -> float:
    """GB: of a walk, four float32 copies of a block, its Hessians twice, hidden states of all windows; or of eval."""
    block = 16 * sum(out * columns for out, columns in shape.linears)
    inverse = 8 * sum(columns**2 for columns in shape.inputs)
    states = hidden_streams * CALIBRATION * shape.hidden * 2
    one_batch = 8 * 2048 * shape.mlp * 4 * 4
    return max(block + inverse + states + one_batch, 2 * shape.parameters + 2e9) / 1e9


def training_memory(shape: Shape) -> tuple[int, float]:
    """GPUs, and GB of each: 16 bytes a parameter sharded over them, the teacher's 2 on each, 6 GB of activations."""
    for gpus in (1, 2, 4, 8):
        each = (16 * shape.parameters / gpus + 2 * shape.parameters) / 1e9 + 6
        if each < 76:
            return gpus, each
    raise ValueError("more than eight GPUs")


if __name__ == "__main__":
    for name, shape in MODELS.items():
        gpus, each = training_memory(shape)
        print(
            f"{name:8} {shape.parameters / 1e9:5.2f}e9 parameters | one-shot {one_shot(shape):5.2f} h "
            f"{memory(shape, 2):4.0f} GB | recovery {recovery(shape):5.2f} h {gpus} x {each:3.0f} GB | "
            f"throughput {throughput(shape):5.2f} h {memory(shape, 1):4.0f} GB"
        )
