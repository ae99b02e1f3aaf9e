# %% [markdown]
# # End to end
#
# Systems of ours beside an offloading engine in PyTorch that takes the same checkpoint and the same policies, on the
# same prompts, with the same memory on the device, in turns. They are compared three times: computed by the virtual
# clock, measured on a *paced* device (this machine, slowed to another one's pace), and measured on this machine as it
# is. The three kinds of time are never mixed: each has its own table and picture. All must give the same tokens.

# %% short="systems, torch, rounds, tokens, slowdown = ['hybrimoe'], ['torch static'], 1, 3, 1"
systems = ["hybrimoe", "ktransformers", "on-demand"]
torch = ["torch hybrid", "torch static", "torch on-demand"]
rounds, tokens, slowdown = 3, 24, 8

# %% [markdown]
# ## Computed, for the paper's machine
#
# The virtual clock adds up what a profile says: here the times of DeepSeek-V2-Lite on an RTX A6000 with half of its
# experts on the device. Nothing was measured on that machine. Both engines plan alike, so their computed times agree:
# what is left between them is then the engines' own.

# %%
import hybrimoe_jax as hj

elsewhere = dict(cache_ratio=0.5, cost_shape="deepseek-v2-lite", max_new_tokens=tokens)
computed = hj.compare(systems=systems, against=torch, clock="virtual", profile="a6000-paper", rounds=1, **elsewhere)
computed.table()

# %%
computed.plot()

# %%
told = computed.table()
ms = dict(zip(told["contender"], told["tbt_ms"]))
print("; ".join(f"{name} {ms[name] / ms['hybrimoe']:.2f} times hybrimoe's time a token" for name in ms))

# %% [markdown]
# ## Paced
#
# Now the runs take the time that the profile says, by the wall clock: programs and copies last as long as there, times
# a slow-down that leaves this machine time to keep up. Whatever an engine loses between its lanes is seen. What is kept
# here was taken on two idle cores.

# %% tags=["measured"]
paced = hj.compare(systems=systems, against=torch, device=f"paced:a6000-paper:{slowdown}", rounds=rounds, **elsewhere)
paced.table()

# %% tags=["measured"]
paced.plot()

# %% [markdown]
# Look at how near the paced times, divided by the slow-down, are to the computed ones.

# %% tags=["measured"]
told = paced.table()
for name, waited in zip(told["contender"], told["tbt_ms"]):
    print(f"{name}: {waited / slowdown / ms[name]:.2f} times the computed time a token")

# %% [markdown]
# ## Measured, on this machine
#
# A CPU alone, without a device of its own: it computes a missing expert sooner than it could be moved, so policies look
# alike and what differs is the engines. Each measures its own costs when it is loaded.

# %% tags=["measured"]
measured = hj.compare(systems=systems, against=torch, cache_ratio=0.25, max_new_tokens=tokens, rounds=rounds)
measured.table()

# %% tags=["measured"]
measured.plot()

# %% tags=["measured"]
told = measured.table()
ms = dict(zip(told["contender"], told["tbt_ms"]))
best = min((name for name in ms if name.startswith("torch")), key=ms.get)
print(f"hybrimoe {ms['hybrimoe']:.2f} ms a token; {best}, the best of PyTorch's, {ms[best] / ms['hybrimoe']:.1f} times")

# %% [markdown]
# `python -m hybrimoe_jax.bench e2e` gives each contender a process of its own, and adds percentiles, floors and other
# libraries: quote its tables, in [results](../docs/results.md).
