import hashlib
import math

import torch

from compressllm.calibration.source import open_source
from compressllm.models.loading import load_model
from compressllm.recover.head import head_of, hidden_states
from compressllm.recover.headchunks import TeacherHidden


def learning_rate(step, config):
    n, t = config.steps, step + 1
    rise = config.warmup * n
    if t <= rise:
        return config.lr * t / rise
    down = config.cooldown * n
    x = (t - rise) / max(1, n - rise - down)
    if x <= 1:
        return config.lr * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * x)))
    return config.lr * config.floor * (n - t + 1) / (down + 1)


class WindowData:
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def batch(self, indices):
        ids = self.ids[indices]
        return {"input_ids": ids, "labels": ids}

    @property
    def sha256(self):
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def load_text(config, tokenizer):
    text = "\n\n".join(t for spec in config.data for t in open_source(spec).texts("calibration"))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    n = len(ids) // config.seqlen
    ids = ids[: n * config.seqlen].view(n, -1)
    k = max(1, round(config.held_out * n))
    return WindowData(ids[:-k]), WindowData(ids[-k:])


class Teacher:
    def __init__(self, model):
        self.model = model
        self.head = head_of(model)

    @torch.inference_mode()
    def __call__(self, batch):
        return TeacherHidden(hidden_states(self.model, batch).flatten(0, 1), self.head)


class Guide:
    def __init__(self, teacher, weights):
        self.teacher, self.weights = teacher, weights

    def loss(self, student, batch, denominator):
        t = self.teacher(batch) if self.teacher else None
        return student(batch, t, self.weights, denominator)


def make_guide(config, bundle, model, device, dtype):
    from compressllm.recover.losses import LossWeights

    w = LossWeights.parse(config.losses)
    t = Teacher(load_model(config.teacher, dtype, device)) if config.teacher else None
    return Guide(t, w)
