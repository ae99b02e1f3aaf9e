"""The process that renders chat templates, which are programs from a download: see `hybrimoe_jax.text.render`.

Run as a file by a bare interpreter (`python -I -S`), so that it starts fast and holds nothing but jinja2:

    render_child.py FOLDERS_OF_JINJA2 SECONDS BYTES

It answers JSON lines on standard input with JSON lines on standard output. The first line that it writes says whether
memory is limited. It ends with its input, when its parent is another, and, in the middle of a template, by a timer.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import sys
import threading

KEPT = 16  # compiled templates
LONGEST = 500  # characters of an error message
ROOM, FACTOR = 8 << 20, 4  # characters of a rendered prompt: that many, and that many times its request
LATE = "html", "pprint", "textwrap", "unicodedata", "jinja2.constants"  # filters import them when they are used
FIRST = "{% for a in [1] %}{{ a | tojson }}{{ strftime_now('%Y') }}{% endfor %}", "{{ a.b.c }}", "{{"


class Renderer:
    """Compiled templates, the last few of them, and what they make of a conversation."""

    def __init__(self):
        for name in LATE:
            importlib.import_module(name)
        self._environment = template_environment()
        self._compiled: dict = {}

    def answer(self, line: str) -> dict[str, str]:
        """{"text": ...}, or {"error": ...} with what the template raised, whatever that is; MemoryError passes."""
        request = json.loads(line)
        try:
            text = self._template(request["template"]).render(request["variables"])
        except RecursionError:
            return {"error": "it nests too deep, or calls itself without an end"}
        except MemoryError:
            raise
        except Exception as error:
            return {"error": described(error)}
        if len(text) > ROOM + FACTOR * len(line):
            return {"error": f"it makes {len(text):,} characters of a conversation of {len(line):,}"}
        return {"text": text}

    def _template(self, source: str):
        if source not in self._compiled:
            while len(self._compiled) >= KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[source] = self._environment.from_string(source)
        return self._compiled[source]


def template_environment():
    """The sandbox in which chat templates run, with the names that published templates use."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's part for training.

        Here it is just its body.
        """

        tags = frozenset({"generation"})  # pyright: ignore[reportAssignmentType]  # jinja2 only reads it

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json  # jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def described(error: Exception) -> str:
    """What a template raised: jinja's errors are written for its user, others are named."""
    import jinja2

    if not isinstance(error, jinja2.TemplateError):
        return f"{type(error).__name__}: {str(error)[:LONGEST]}"
    line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{line}{error.message}"[:LONGEST]


def limit_memory(most: int) -> bool:
    """Limits this process's memory to `most` bytes, and lets it open no file -> whether its memory is limited."""
    try:
        import resource
    except ImportError:  # Windows
        return False

    def lower(kind: str, value: int) -> bool:
        try:
            number = getattr(resource, kind)
            allowed = resource.getrlimit(number)[1]
            value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
            resource.setrlimit(number, (value, value))
        except (AttributeError, OSError, ValueError):
            return False
        return True

    for kind, value in (("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", 3)):
        lower(kind, value)
    return sys.platform != "darwin" and lower("RLIMIT_AS", most)  # macOS takes the number and does nothing


def limit_time(seconds: float) -> None:
    """Ends this process after so many more seconds of computing, if its parent does not; 0 calls that off."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def watch(parent: int) -> None:
    """Ends this process soon after its parent has, in the middle of a template too."""
    never = threading.Event()
    while os.getppid() == parent:
        never.wait(1)
    os._exit(1)


def serve(seconds: float, most: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    renderer = Renderer()
    for template in FIRST:  # so that what they import, and the time zone, is read before files are out of reach
        renderer.answer(json.dumps({"template": template, "variables": {}}))
    print(json.dumps({"memory": limit_memory(most)}), flush=True)
    for line in sys.stdin:
        limit_time(seconds)
        try:
            answer = json.dumps(renderer.answer(line))
        except MemoryError:
            answer = "{}"
        limit_time(0)
        print(answer, flush=True)


if __name__ == "__main__":
    sys.path += sys.argv[1].split(os.pathsep)
    serve(float(sys.argv[2]), int(sys.argv[3]))
