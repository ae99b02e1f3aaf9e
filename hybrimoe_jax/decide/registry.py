"""How a rule is named: a cache policy, a scheduler or a predictor.

One way for all three: a built-in's name, a class, what a class gives when it is called with parameters alone, or
"package.module:Class". Names take parameters behind a colon: "mrs:alpha=0.3,p=6", "mine:Fading:decay=0.9". Each of
them becomes a `Rule`. An engine makes objects of its own from it, so nothing is shared between two runs.

`cache.CACHES`, `schedule.RULES` and `prefetch.predictors.FORESEEING` are the three kinds.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

from hybrimoe_jax import arguments
from hybrimoe_jax.decide import by_value
from hybrimoe_jax.errors import UserError, said, shown, shown_name

OWN = "a class of yours as package.module:Class"


class Rule(str):
    """A rule's name that knows its class and its parameters.

    It reads, compares and is written as text: a built-in's name or "module:Class", and behind a colon the parameters.
    It goes to other processes with its class, even one that was defined in a notebook.

    Attributes:
      made_by: the class. parameters: what it is called with beside the model's numbers.
      label: the name without the parameters; `said`: the parameters as text.
    """

    made_by: type[Any]
    parameters: Mapping[str, Any]
    label: str
    said: str

    def __new__(cls, made_by: type[Any], parameters: Mapping[str, Any], label: str | None = None) -> Self:
        label = f"{made_by.__module__}:{made_by.__qualname__}" if label is None else label
        said = ",".join(f"{name}={_written(value)}" for name, value in parameters.items())
        self = super().__new__(cls, f"{label}:{said}" if said else label)
        self.made_by, self.parameters, self.label, self.said = made_by, dict(parameters), label, said
        return self

    def __reduce__(self):
        try:
            return _unpacked, (by_value.dumps((self.made_by, self.parameters)), self.label)
        except by_value.FAILURES as error:
            raise UserError(
                f"{self} cannot be sent to other processes ({said(error)}): take one process "
                "(jobs 1), or put the class into a file of its own"
            ) from error

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @property
    def built_in(self) -> bool:
        """Whether it is one of the package's, for which tests prove what others are watched for."""
        return self.made_by.__module__.startswith("hybrimoe_jax.")


class Parametric:
    """What the three contracts share: their classes remember what they are called with.

    Where a class needs a model's numbers, calling it with parameters alone gives a `Rule`, not yet an object.
    """

    needs_model: ClassVar[bool] = True
    _called_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first, *others = inspect.signature(cls.__init__).parameters.values()  # `__new__` would hide them
        del first
        cls.__signature__ = inspect.Signature(others)

    def __new__(cls, *args: Any, **parameters: Any) -> Self:
        if cls.needs_model and not args and "num_experts" not in parameters:
            return cast(Self, Rule(cls, parameters))
        self = super().__new__(cls)
        if not cls.needs_model:
            self._called_with = args, parameters
        return self

    def __getnewargs__(self) -> tuple[None]:
        return (None,)  # a copy is an object, not a `Rule`

    def as_rule(self) -> Rule:
        """The rule that makes more objects like this one."""
        args, parameters = self._called_with
        return Rule(type(self), inspect.signature(type(self)).bind(*args, **parameters).arguments)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of rule.

    Attributes:
      what: how messages call it; `flag`: in front of a rule's name.
      base: the contract. known: the built-in ones by name.
      methods: what the contract asks and with which arguments.
      model: the constructor's arguments that whoever uses the rule fills in.
      try_out: makes one for a small model, from (class, parameters).
      also: further words for the list of what is known.
    """

    what: str
    flag: str
    base: type[Any]
    known: Mapping[str, type[Any]]
    methods: Mapping[str, tuple[str, ...]]
    model: tuple[str, ...]
    try_out: Callable[[type[Any], Mapping[str, Any]], Any]
    also: str = ""

    def resolve(self, spec: Any) -> Rule:
        """The rule that `spec` names, ready to be made; UserError for what is none, or none of this kind."""
        if isinstance(spec, Rule):
            rule = self._renamed(spec.made_by, spec.parameters, spec.label)
        elif isinstance(spec, str):
            rule = self._named(spec)
        elif isinstance(spec, type):
            rule = self._renamed(cast(type[Any], spec), {})
        elif isinstance(spec, self.base) and not self.base.needs_model:
            made = spec.as_rule()
            rule = self._renamed(made.made_by, made.parameters)
        elif isinstance(spec, self.base):
            name = type(spec).__name__
            raise UserError(
                f"{self.flag}: this {name} was made for one model; give the class, or {name}(...) with its own "
                f"parameters alone, without {', '.join(self.model)}: each engine makes objects of its own"
            )
        else:
            raise UserError(
                f"{self.flag} {shown(spec)} is neither a name nor a class (known: {', '.join(self.known)}{self.also}; "
                f"or {OWN})"
            )
        self._check(rule)
        return rule

    def _renamed(self, made_by: type[Any], parameters: Mapping[str, Any], label: str | None = None) -> Rule:
        """Built-in classes go by their names."""
        if label not in self.known:
            label = next((name for name, known in self.known.items() if known is made_by), label)
        return Rule(made_by, parameters, label)

    def _named(self, spec: str) -> Rule:
        name, _, rest = spec.partition(":")
        if name in self.known:
            return Rule(self.known[name], self._parameters(self.known[name], name, rest), name)
        if not rest:
            raise UserError(
                f"{self.what} {shown(spec)} is unknown (known: {', '.join(self.known)}{self.also}; or {OWN})"
            )
        of_class, _, rest = rest.partition(":")
        found = self.imported(spec)
        self._check_class(spec, found)
        return Rule(found, self._parameters(found, f"{name}:{of_class}", rest), f"{name}:{of_class}")

    def imported(self, spec: str) -> type[Any]:
        """The class that "package.module:Class" names; UserError where there is none."""
        module, _, name = spec.partition(":")
        name = name.partition(":")[0]
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part, None)
        except UserError:
            raise
        except Exception as error:  # whatever the user's module does wrong while it is imported
            raise UserError(
                f"{self.flag} {shown(spec)}: importing {shown_name(module)} failed ({said(error)})"
            ) from None
        if found is None:
            hint = ": define the class first, or put it into a file of its own" if module == "__main__" else ""
            raise UserError(f"{self.flag} {shown(spec)}: module {module} has no {shown_name(name)}{hint}")
        if not isinstance(found, type):
            raise UserError(f"{self.flag} {shown(spec)}: {shown_name(name)} is not a class")
        return cast(type[Any], found)

    def _parameters(self, made_by: type[Any], name: str, text: str) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        known = self.parameters_of(made_by)
        for part in text.split(",") if text else ():
            key, _, value = part.partition("=")
            arguments.names(f"{self.flag} {shown_name(name)}", [key], known, "parameter ")
            chosen[key] = _read(f"{self.flag} {name}: {key}", value, known[key])
        return chosen

    def parameters_of(self, made_by: type[Any]) -> dict[str, inspect.Parameter]:
        """The constructor's own parameters, those of the model left out."""
        return {
            name: parameter
            for name, parameter in inspect.signature(made_by).parameters.items()
            if name not in self.model and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }

    def _check(self, rule: Rule) -> None:
        """UserError for a class that does not fulfil the contract, as far as can be seen without a run."""
        self._check_class(rule, rule.made_by)
        if rule.built_in:  # others may pass on what is not theirs
            known = self.parameters_of(rule.made_by)
            arguments.names(f"{self.flag} {rule.label}", rule.parameters, known, "parameter ")
        else:
            for name, takes in self.methods.items():
                self._check_method(rule, name, takes)
        if rule.parameters or not rule.built_in:
            self._try_out(rule)

    def _check_class(self, name: str, made_by: type[Any]) -> None:
        base = f"hybrimoe_jax.decide.{self.base.__name__}"
        if not issubclass(made_by, self.base):
            raise UserError(f"{self.flag} {shown(name)}: {made_by.__name__} is not a class derived from {base}")
        if inspect.isabstract(made_by):
            missing = ", ".join(sorted(cast(Any, made_by).__abstractmethods__))
            raise UserError(f"{self.flag} {shown(name)}: {made_by.__name__} lacks the method {missing} of {base}")

    def _check_method(self, rule: Rule, name: str, takes: tuple[str, ...]) -> None:
        method = getattr(rule.made_by, name)
        if not callable(method):
            raise UserError(f"{self.flag} {rule}: {rule.made_by.__name__}.{name} is not a method")
        try:
            inspect.signature(method).bind(None, *takes)
        except TypeError as error:
            raise UserError(
                f"{self.flag} {rule}: {rule.made_by.__name__}.{name} must take ({', '.join(('self', *takes))}): {error}"
            ) from None

    def _try_out(self, rule: Rule) -> None:
        try:
            made = self.try_out(rule.made_by, rule.parameters)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.flag} {shown_name(rule)}: making it failed ({said(error)}); it is called with "
                f"{', '.join(self.model) or 'its own parameters alone'}, and passes on what it does not know"
            ) from error
        for each in made:
            if not isinstance(each, self.base):
                raise UserError(f"{self.flag} {shown_name(rule)}: making it gave a {type(each).__name__}")


def _unpacked(packed: bytes, label: str) -> Rule:
    made_by, parameters = by_value.loads(packed)
    return Rule(made_by, parameters, label)


def _written(value: Any) -> str:
    """A parameter's value as names have it; "..." where that cannot be."""
    text = value if isinstance(value, str) else repr(value)
    return text if isinstance(value, (int, float, str, type(None))) and "," not in text else "..."


def _read(what: str, text: str, parameter: inspect.Parameter) -> Any:
    """A parameter's value from a name: as it is annotated, else as it looks."""
    annotation = parameter.annotation
    declared = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kind, *others = declared.split(" | ")
    if text == "...":
        raise UserError(f"{what} stands for a value that a name cannot hold: give the class or object itself")
    if text == "None" and "None" in others:
        return None
    if kind == "str":
        return text
    try:
        if kind in ("int", "float"):
            return int(text) if kind == "int" else float(text)
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    if kind in ("int", "float") or (isinstance(value, str) and isinstance(parameter.default, (int, float))):
        raise UserError(f"{what}={shown(text)} is not a {'whole ' if kind == 'int' else ''}number")
    return value if isinstance(value, (int, float, type(None))) else text
