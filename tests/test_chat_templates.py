"""Chat templates: which one a conversation gets, what it is given, and that none of them can do harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from public_traces import shared
from test_text import byte_level, saved

from hybrimoe_jax import generate
from hybrimoe_jax.errors import UserError
from hybrimoe_jax.text import Tokenizer, render
from hybrimoe_jax.text.render_child import Renderer, limit_memory

TALK = [{"role": "user", "content": "Hi"}]
SEVERAL = {"tool_use": "T {{ tools }}", "rag": "R {{ documents[0].title }}"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]


def several(folder, default=None, place="config"):
    named = SEVERAL | ({} if default is None else {"default": default})
    if place == "config":
        return saved(
            folder, byte_level(), chat_template=[{"name": k, "template": v} for k, v in named.items()], eos_token="</s>"
        )
    saved(folder, byte_level(), chat_template="what files replace", eos_token="</s>")
    (folder / "additional_chat_templates").mkdir()
    for name, template in named.items():
        path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize("place", ["config", "files"])
def test_a_template_is_chosen_as_transformers_chooses(tmp_path, place):
    ours = several(tmp_path / "default", "D {{ messages[0].content }}", place)
    assert ours.apply_chat_template(TALK) == "D Hi"
    assert ours.apply_chat_template(TALK, tools=[{"a": 1}]) == "T [{'a': 1}]"
    assert ours.apply_chat_template(TALK, chat_template="rag", documents=[{"title": "x"}]) == "R x"
    assert ours.apply_chat_template(TALK, chat_template="own {{ bos_token }}{{ x }}", x=1) == "own <s>1"
    without = several(tmp_path / "none", None, place)
    assert without.has_chat_template and without.apply_chat_template(TALK, tools=[]) == "T []"
    with pytest.raises(UserError, match=r"are rag, tool_use, and none is the default: choose one"):
        without.apply_chat_template(TALK)
    with pytest.raises(
        UserError, match=r"no chat template 'tool', and that is no template's text: .* has rag, tool_use"
    ):
        without.apply_chat_template(TALK, chat_template="tool")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(
        tmp_path / "default" if place == "files" else tmp_path / "none"
    )
    named = ours if place == "files" else without
    assert named.apply_chat_template(TALK, tools=TOOLS) == theirs.apply_chat_template(TALK, tools=TOOLS, tokenize=False)


@pytest.mark.filterwarnings("ignore:the chat template does not use")
@pytest.mark.parametrize(
    "name",
    ["Qwen-Qwen3-0.6B", "mistralai-Mistral-Nemo-Instruct-2407", "openai-gpt-oss-120b", "deepseek-ai-DeepSeek-V3.1"],
)
def test_published_templates_render_as_in_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    template = shared(f"chat-templates/{name}.jinja").read_text(encoding="utf-8")
    ours = saved(tmp_path, byte_level(), chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = template
    reply = {"role": "assistant", "content": "Hello & <you>", "reasoning": "so", "tool_calls": None}
    talk = [*TALK, reply, {"role": "user", "content": "Who?"}]
    for options in ({}, {"tools": TOOLS}, {"enable_thinking": False, "thinking": True}):
        given = dict(add_generation_prompt=True, **options)
        assert ours.apply_chat_template(talk, **given) == theirs.apply_chat_template(talk, tokenize=False, **given)


def test_what_a_template_is_given_is_plain_data(tmp_path):
    tokenizer = saved(
        tmp_path, byte_level(), chat_template="{{ messages[0].content | tojson }}{{ messages[0] | length }}"
    )

    def rendered(content):
        return tokenizer.apply_chat_template([{"role": "user", "content": content, "name": None}])

    assert rendered(np.array([1, 2])) == "[1, 2]2" and rendered(np.float32(0.5)) == "0.52"
    assert rendered("\ud800\x00") == '"\ud800\\u0000"2'
    circle: list = []
    circle.append(circle)
    for wrong in (object(), circle, b"x", {1, 2}):
        with pytest.raises(UserError, match="a chat template takes what JSON can say"):
            rendered(wrong)
    for messages in ("Hi", [], ["Hi"], None, 5):
        with pytest.raises(UserError, match="messages"):
            tokenizer.apply_chat_template(messages)
    with pytest.raises(UserError, match=r"tools: a list of JSON objects is wanted, not 'f'"):
        tokenizer.apply_chat_template(TALK, tools=["f"])
    for template in (5, [], {}, b"x", Path("x.jinja")):
        with pytest.raises(UserError, match=r"chat_template .* is no text"):
            tokenizer.apply_chat_template(TALK, chat_template=template)
    with pytest.warns(UserWarning, match="does not use documents"):
        tokenizer.apply_chat_template(TALK, documents=[{}])


@pytest.mark.parametrize("chat_template", [5, [{"name": "x"}], [{"name": [], "template": "x"}], ["x"], {"x": 1}])
def test_what_is_no_template_is_refused(tmp_path, chat_template):
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is no text"):
        saved(tmp_path, byte_level(), chat_template=chat_template)
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: .* is not UTF-8"):
        Tokenizer(tmp_path)


def test_the_command_gives_templates_what_its_flags_name(tmp_path):
    tokenizer = several(tmp_path / "model", "D {{ messages[0].content }}")
    (tmp_path / "own.jinja").write_text("O {{ messages[0].content }}{{ documents }}")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "none.jinja").write_text("text")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "bad.json").write_text("[")

    def prompt(*flags):
        args = generate.parser().parse_args(["--prompt", "Hi", *(str(flag) for flag in flags)])
        return tokenizer.decode(generate.prompt_ids("Hi", args, tokenizer, generate.read_chat_options(args), 100))

    assert prompt() == "D Hi" and prompt("--ignore-chat-template") == "Hi"
    assert prompt("--tools", tmp_path / "tools.json").startswith("T [{'type': 'function'")
    assert prompt("--chat-template", "rag", "--documents", tmp_path / "tools.json") == "R "
    assert prompt("--chat-template", tmp_path / "own.jinja") == "O HiNone"
    for flags, said in (
        (("--chat-template", "nonsense"), "there is no chat template 'nonsense'"),
        (("--chat-template", tmp_path / "none.jinja"), "that is no chat template"),
        (("--chat-template", "rag", "--ignore-chat-template"), "--chat-template is for the chat template"),
        (("--tools", tmp_path / "nowhere"), "--tools .*nowhere: no such file"),
        (("--tools", tmp_path), "--tools .*Is a directory"),
        (("--tools", tmp_path / "object.json"), "a list of JSON objects is wanted"),
        (("--documents", tmp_path / "bad.json"), r"--documents .*bad\.json: not valid JSON"),
    ):
        with pytest.raises(UserError, match=said):
            prompt(*flags)


HOSTILE = {
    "{{ 'a' * 3000000000 }}": "more than 512 MB of memory",
    "{{ '%3000000000d' % 1 }}": "more than 512 MB of memory",
    "{{ 'a' | center(3000000000) }}": "more than 512 MB of memory",
    "{{ 'a' * 3e9 }}": "TypeError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'x'.encode('nonsense') }}": "LookupError",
    "{{ range(10 ** 10) | list }}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "nests too deep, or calls itself",
    "{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}": "nests too deep, or calls itself",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30: "SyntaxError",
    "{{ 'a' * 9000000 }}": "it makes 9,000,000 characters of a conversation of",
    "{{ raise_exception('\x1b[31m' + 'x' * 1000000) }}": r"\\x1b\[31mxxx",
    "a\n{% nonsense %}": "line 2: Encountered unknown tag 'nonsense'",
    "{% include 'secret' %}": "TypeError: no loader",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_whatever_a_template_does_is_one_short_error(tmp_path, template):
    tokenizer = saved(tmp_path, byte_level(), chat_template=template)
    with pytest.raises(UserError, match=HOSTILE[template]) as caught:
        tokenizer.apply_chat_template(TALK)
    assert len(str(caught.value)) < 900 and str(caught.value).isprintable()
    assert tokenizer.apply_chat_template(TALK, chat_template="{{ messages[0].content }}") == "Hi", (
        "the next one renders"
    )


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(render, "SECONDS", 0.3)
    renderer = render.Renderer()
    loops = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(render.TemplateError, match=r"more than 0\.3 seconds"):
        renderer.render(loops, "{}")
    assert not renderer.alive
    renderer = render.Renderer()
    monkeypatch.setattr(render, "PATIENCE_S", 0.5)  # one that computes nothing, as a stopped process, is ended too
    os.kill(renderer._process.pid, signal.SIGSTOP)
    with pytest.raises(render.TemplateError, match="seconds"):
        renderer.render("x", "{}")


def test_one_process_serves_all_threads_and_is_kept():
    render.render("x", {})
    first = render._renderer._process.pid
    got = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: render.render("{{ i }}" + "x" * i, {"i": i})}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: str(i) + "x" * i for i in range(8)} and render._renderer._process.pid == first

    def computed():
        return time.process_time() + render._renderer._computed_s()

    talk = {"messages": [{"role": "user", "content": "Hi " * 300}] * 10}
    times = [-computed() + (render.render("{% for m in messages %}{{ m }}{% endfor %}", talk), computed())[1]
             for _ in range(20)]  # fmt: skip
    assert min(times) < 2e-3, "processor time of both processes for a prompt"
    os.kill(first, signal.SIGKILL)
    render._renderer._process.wait()
    assert render.render("y", {}) == "y", "one that somebody else ended is started again"


PROGRAM = """
import os, sys, threading, time, multiprocessing
from hybrimoe_jax.text import render
def work(i):
    return render.render("{{ i }}", {"i": i})
if __name__ == "__main__":
    render.SECONDS = 60
    render.render("x", {})
    child = render._renderer._process.pid
    pid = os.fork()
    if not pid:
        assert work(1) == "1" and render._renderer._process.pid != child
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and work(2) == "2" and render._renderer._process.pid == child
    loops = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    threading.Thread(target=render.render, args=(loops, {}), daemon=True).start()
    time.sleep(0.2)
    print(child, "jax" in sys.modules, flush=True)
    time.sleep(60)
"""


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_the_process_ends_with_its_parent_in_the_middle_of_a_template(tmp_path):
    """And a forked process has one of its own. The parent is killed: nothing of its own runs at its end."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as parent:
        pid, jax = parent.stdout.readline().split()
        assert jax == "False" and running(int(pid))
        parent.kill()
    end = time.monotonic() + 60
    while running(int(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not running(int(pid))


def test_a_machine_without_limits_is_said(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    source = render.CHILD.read_text()
    child.write_text(
        "import sys; sys.modules['resource'] = None\n" + source.replace("from __future__ import annotations", "")
    )
    monkeypatch.setattr(render, "CHILD", child)
    with pytest.warns(UserWarning, match="limits no memory"):
        renderer = render.Renderer()
    assert renderer.render("x", "{}") == "x"
    renderer.end()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(UserError, match="cannot be started for it"):
        render.Renderer()
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(UserError, match=r"cannot be started for it \(exit code 0\)"):
        render.Renderer()


def test_the_process_can_open_no_file():
    """In a bare interpreter, so that this one keeps its limits."""
    program = f"import sys; sys.path.insert(0, {str(render.CHILD.parent)!r})\nimport render_child, socket\n"
    program += "assert render_child.limit_memory(1 << 29)\nopen('/etc/passwd')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert "Too many open files" in done.stderr


def test_the_childs_own_answers(monkeypatch):
    """In this process, where a debugger and a count of lines reach them."""
    renderer = Renderer()

    def answer(template, **variables):
        return renderer.answer(json.dumps({"template": template, "variables": variables}))

    assert answer("{{ a }}", a=1) == {"text": "1"}
    assert answer("{{ a.b.c }}") == {"error": "'a' is undefined"}
    assert answer("\n{{")["error"].startswith("line 2: ")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert not limit_memory(1)
