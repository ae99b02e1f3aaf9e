# %% [markdown]
# # Your own model
#
# From a Hugging Face folder to an engine, and the proof that nothing was lost on the way: the same logits and the same
# greedy tokens as transformers. Then a family that the package does not know. The model here is small and random, so
# that this runs anywhere; for one of yours begin at "Convert". Needs torch and transformers: the extra `baseline`.
#
# ## A folder of Hugging Face's

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

import hybrimoe_jax as hj
from hybrimoe_jax.tables import table

folder = tempfile.TemporaryDirectory()
source, destination = Path(folder.name, "hf"), Path(folder.name, "converted")

transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
config = transformers.Qwen3MoeConfig(
    **sizes, head_dim=16, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, intermediate_size=96
)
config._attn_implementation = "eager"
reference = transformers.Qwen3MoeForCausalLM(config).float().eval()
with torch.no_grad():
    for name, weight in reference.named_parameters():
        if weight.ndim > 1:  # the initial values are so small that experts would hardly matter
            weight.normal_(std=1.0 if "mlp.gate.weight" in name else weight.shape[-1] ** -0.5)
reference.save_pretrained(source)
sorted(path.name for path in source.iterdir())

# %% [markdown]
# ## Convert
#
# Once, layer by layer. On the command line: `python -m hybrimoe_jax.convert path/to/hf-folder my-model`. Experts are
# stored so that one expert is one read.

# %%
from hybrimoe_jax.checkpoint.convert import convert

path = convert(source, destination)
print(f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6:.1f} MB")

# %% [markdown]
# ## Check parity
#
# A quarter of the experts has a slot; the others are computed by the CPU or fetched. Look at the largest difference of
# logits, beside the logits' own size, and at the tokens.

# %%
ids = [7, 42, 301, 5, 99, 18]


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def tokens_of(model, ids, count):
    return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


def parity(path):
    """Ours beside transformers: one row."""
    with hj.load(path, cache_ratio=0.25, machine="a6000-paper") as engine:
        ours, theirs = engine.logits(ids), logits_of(reference, ids)
        same = engine.generate(ids, max_new_tokens=24).token_ids[0] == tokens_of(reference, ids, 24)
    far = np.abs(ours - theirs).max()
    return {
        "largest logit": np.abs(theirs).max(),
        "within 1e-5 of it": bool(far < 1e-5 * np.abs(theirs).max()),
        "same tokens": same,
    }


table([parity(path)])

# %% [markdown]
# ## Add a family
#
# A checkpoint of a `model_type` that is not known is refused, with one line.

# %%
import json

settings = json.loads((source / "config.json").read_text())
(source / "config.json").write_text(json.dumps(settings | {"model_type": "my_moe"}))
try:
    convert(source, Path(folder.name, "mine"))
except hj.UserError as error:
    print(error)

# %% [markdown]
# A family is a configuration, whose fields are the keys of `config.json`, and a function that builds the dense part of
# the model. Routed experts are the engine's business. This one is a decoder with grouped-query attention, a norm on
# every query and key head, and a softmax router.

# %%
import dataclasses
from typing import ClassVar

from hybrimoe_jax.models.config import ModelConfig
from hybrimoe_jax.models.decoder import assemble, grouped_query
from hybrimoe_jax.models.moe import MoEBlock
from hybrimoe_jax.models.registry import FAMILIES, Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyConfig(ModelConfig):
    num_experts: int
    moe_intermediate_size: int
    head_dim: int | None = None
    norm_topk_prob: bool = False

    aliases: ClassVar = {"num_local_experts": "num_experts"}  # what transformers 5 writes

    @property
    def moe_width(self):
        return self.moe_intermediate_size

    def is_moe(self, layer):
        return True


def build(config, rngs):
    def block():
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        return MoEBlock(*sizes, normalise=config.norm_topk_prob, rngs=rngs)

    attention = grouped_query(config, rngs, qkv_bias=False, out_bias=False, qk_norm="head", eps=config.rms_norm_eps)
    return assemble(config, rngs, attention, block)


FAMILIES["my_moe"] = Family(MyConfig, build)
table([parity(convert(source, Path(folder.name, "mine")))])

# %% [markdown]
# Every executor, system and format now takes the family. To keep it, put the file into `models/families/`; what else a
# family needs, its tests above all, is in [contributing](../CONTRIBUTING.md).

# %%
folder.cleanup()
