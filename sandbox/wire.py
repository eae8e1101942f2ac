"""The wire between a program and its judge. It carries calls and plain values, never code.

    write(fd, data), read(fd)     one message: four bytes of length, then the data
    Peer                          one end: calls functions of the other end and answers its calls

A value crosses as a tree of numbers, strings and lists. CARRIED says how each type is taken apart
and rebuilt. Any other value, e.g. an instance of the program's own class, is Uncarried. Trees are
pickled, but the judge's unpickler loads no class at all, so a forged message can only be wrong.

A function crosses as a number and becomes a function that calls back. So does an iterator, which
is read one item at a time.
"""

import collections
import contextlib
import datetime
import decimal
import fractions
import io
import os
import pickle
import re
import struct
import sys
import types
from importlib import import_module

LONGEST = 256 << 20  # bytes of a message


class Uncarried(BaseException):
    """A value has no plain form. Not an Exception, so that no test takes it for the program's."""


class Broken(BaseException):
    """A message makes no sense, or the other end is closed. Not an Exception either."""


def write(fd, data):
    view = memoryview(struct.pack("=I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def read(fd):
    """One message of write(), as a bytearray. No copy of it stays in memory."""
    (size,) = struct.unpack("=I", read_exactly(fd, 4))
    if size > LONGEST:
        raise Broken("a message is too long")
    return read_exactly(fd, size)


def read_exactly(fd, count):
    data = bytearray(count)
    view = memoryview(data)
    while view:
        if not (got := os.readv(fd, [view])):
            raise Broken("the other end is closed")
        view = view[got:]
    return data


def describe(error):
    """A short, printable line about an exception, whose own methods may fail."""
    text = type(error).__name__
    with contextlib.suppress(BaseException):
        text = str(error) if isinstance(error, Uncarried | Broken) else f"{text}: {error}"
    return "".join(c if c.isprintable() else "?" for c in text[:300])


class Plain(pickle.Unpickler):
    """Loads numbers, strings, and tuples, lists and dicts of them; refuses any pickled class."""

    def find_class(self, module, name):
        raise Broken(f"a message names {module}.{name}")


def take_array(value):
    if value.dtype.kind not in "biufcSUmM":  # numbers, strings and times: no objects
        raise Uncarried(f"not carried: an array of {value.dtype}")
    return value.dtype.str, list(value.shape), value.tobytes()


def make_array(kind, shape, data):
    np = import_module("numpy")  # imported only if an array comes
    return np.frombuffer(data, np.dtype(str(kind))).reshape(shape).copy()  # refuses objects, too


def take_match(match):
    parts = match.re.pattern, match.re.flags, match.string, match.start(), match.endpos
    again = make_match(*parts)
    if again is None or again.regs != match.regs:
        raise Uncarried("not carried: a match that its place does not determine")
    return parts


def make_match(pattern, flags, string, start, end, compile=re.compile):  # setup may replace it
    return compile(pattern, flags).match(string, start, end)


def make_dtype(name):
    torch = import_module("torch")
    return {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}[name]


def flat(mapping):
    return [part for pair in mapping.items() for part in pair]


def paired(parts):
    return zip(parts[::2], parts[1::2], strict=True)


LEAVES = {type(None), bool, int, float, str, bytes}  # pickle writes these without naming a class
FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set)}
CARRIED = {  # type: (its parts, which are carried in turn; the value made from them)
    "builtins.list": (list, lambda *parts: list(parts)),
    "builtins.tuple": (tuple, lambda *parts: parts),
    "builtins.set": (set, lambda *parts: set(parts)),
    "builtins.frozenset": (frozenset, lambda *parts: frozenset(parts)),
    "builtins.dict": (flat, lambda *parts: dict(paired(parts))),
    "builtins.mappingproxy": (flat, lambda *parts: types.MappingProxyType(dict(paired(parts)))),
    "builtins.complex": (lambda v: (v.real, v.imag), complex),
    "builtins.range": (lambda v: (v.start, v.stop, v.step), range),
    "builtins.slice": (lambda v: (v.start, v.stop, v.step), slice),
    "builtins.bytearray": (lambda v: [bytes(v)], bytearray),
    "collections.deque": (lambda v: (v.maxlen, *v), lambda n, *v: collections.deque(v, n)),
    "collections.Counter": (flat, lambda *parts: collections.Counter(dict(paired(parts)))),
    "collections.OrderedDict": (flat, lambda *parts: collections.OrderedDict(paired(parts))),
    "collections.defaultdict": (
        lambda v: [getattr(v.default_factory, "__name__", None), *flat(v)],
        lambda name, *parts: collections.defaultdict(FACTORIES.get(name), paired(parts)),
    ),
    "datetime.datetime": (lambda v: [v.isoformat()], datetime.datetime.fromisoformat),
    "datetime.date": (lambda v: [v.isoformat()], datetime.date.fromisoformat),
    "datetime.timedelta": (lambda v: (v.days, v.seconds, v.microseconds), datetime.timedelta),
    "decimal.Decimal": (lambda v: [str(v)], decimal.Decimal),
    "fractions.Fraction": (lambda v: (v.numerator, v.denominator), fractions.Fraction),
    "re.Pattern": (lambda v: (v.pattern, v.flags), re.compile),
    "re.RegexFlag": (lambda v: [int(v)], re.RegexFlag),
    "re.Match": (take_match, make_match),
    "numpy.ndarray": (take_array, make_array),
    "numpy.generic": (take_array, lambda *parts: make_array(*parts)[()]),
    "scalars": (None, lambda key, array: CARRIED[key][1](*array)),  # many numpy.generic at once
    "torch.Tensor": (lambda v: [v.detach().numpy()], lambda a: import_module("torch").tensor(a)),
    "torch.Size": (tuple, lambda *parts: import_module("torch").Size(parts)),
    "torch.dtype": (lambda v: [str(v)], make_dtype),
}
MUTABLE = {"builtins." + kind for kind in ("list", "set", "dict", "bytearray")}
MUTABLE |= {"numpy.ndarray", "torch.Tensor"}
OURS = ("program", "checks")  # the modules in which the two ends run what they are given


def key_of(value):
    """The name of the value's exact type, as in CARRIED; one name for all of numpy's scalars."""
    if isinstance(value, getattr(sys.modules.get("numpy"), "generic", ())):
        return "numpy.generic"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def assign(old, new):
    """Make `old`, a mutable value of the judge's, equal to `new`."""
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, set | dict):
        old.clear()
        old.update(new)
    else:  # an array or a tensor
        old[...] = new


class Peer:
    """One end of the wire. The other end may call the functions in `handles`, by their index.

    An end that `trusts` the other takes modules, classes and functions of libraries by name. The
    program's end does so always, the judge's only while it asks for names missing from the test.
    """

    def __init__(self, reads, writes, trusts=False):
        self.reads, self.writes = reads, writes  # descriptors
        self.trusts = trusts
        self.handles = []
        self.doubt = ""  # why the verdict may be wrong: a value not carried, an argument changed
        self.failed = False  # a call ended in Uncarried or Broken

    def encode(self, value):
        """The tree of a value."""
        if type(value) in LEAVES:
            return value
        key = key_of(value)
        if key in CARRIED:
            parts = list(CARRIED[key][0](value))
            kinds = set(map(type, parts))
            if kinds <= LEAVES:
                return key, parts
            if len(kinds) == 1 and len(parts) > 99 and key_of(parts[0]) == "numpy.generic":
                return "scalars", [key, self.encode(import_module("numpy").array(parts))]
            return key, [self.encode(part) for part in parts]
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        if hasattr(value, "__next__"):
            self.handles.append(lambda: next(value))
            return "iterator", len(self.handles) - 1
        if callable(value):
            module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
            library = module in sys.modules and module not in OURS
            if library and getattr(sys.modules[module], str(name), None) is value:
                return "named", [module, name]
            if type(value).__module__ == "builtins":
                self.handles.append(value)
                return "function", len(self.handles) - 1
        raise Uncarried(f"not carried: a {key}")

    def decode(self, tree):
        """The value of a tree."""
        if type(tree) in LEAVES:
            return tree
        key, parts = tree
        if key in CARRIED:
            values = [part if type(part) in LEAVES else self.decode(part) for part in parts]
            return CARRIED[key][1](*values)
        if key == "function":
            return self.remote(parts)
        if key == "iterator":
            return self.iterate(parts)
        if not self.trusts:
            raise Uncarried(f"not carried: the {key} {parts}")
        if key == "named":
            return getattr(sys.modules[parts[0]], parts[1])
        known = parts in sys.modules or parts.partition(".")[0] in sys.stdlib_module_names
        return import_module(parts) if known else None

    def remote(self, handle):
        def program(*args, **kwargs):
            try:
                return self.call(handle, args, kwargs)
            except StopIteration:  # would silently end a loop over map(program, ...) in the test
                raise RuntimeError("the program raised StopIteration") from None

        return program

    def iterate(self, handle):
        with contextlib.suppress(StopIteration):
            while True:
                yield self.call(handle, (), {})

    def send(self, *message):
        data = pickle.dumps(message, protocol=5)
        if len(data) > LONGEST:
            raise Uncarried("not carried: too much data")
        write(self.writes, data)

    def receive(self):
        return Plain(io.BytesIO(read(self.reads))).load()

    def call(self, handle, args, kwargs):
        """Call the other end's function `handle`. Raises what it raises, Uncarried or Broken."""
        try:
            self.send("call", handle, [self.encode(arg) for arg in args], self.encode(kwargs))
            while (message := self.receive())[0] == "call":  # of a function passed as an argument
                self.answer(*message[1:])
            kind, result, changed = message
            if kind == "uncarried":
                raise Uncarried(result)
            result = self.decode_exception(*result) if kind == "raise" else self.decode(result)
            if changed:
                self.doubt = "an argument was changed"
            if result is None:  # only a function that returns nothing may change the test's values
                for i, new in changed.items():
                    assign(args[i], self.decode(new))
        except BaseException as error:
            self.doubt = describe(error)
            self.failed = True
            raise error if isinstance(error, Uncarried) else Broken(self.doubt) from None
        if kind == "raise":
            raise result
        return result

    def answer(self, handle, args, kwargs):
        """Run a call from the other end; send its outcome and the arguments it changed in place."""
        try:
            values = [self.decode(arg) for arg in args]
            result = self.encode(self.handles[handle](*values, **self.decode(kwargs)))
            after = {i: self.encode(v) for i, v in enumerate(values) if key_of(v) in MUTABLE}
            reply = "value", result, {i: new for i, new in after.items() if new != args[i]}
        except Uncarried as error:
            reply = "uncarried", str(error), {}
        except BaseException as error:
            reply = "raise", self.encode_exception(error), {}
        self.send(*reply)

    def encode_exception(self, error):
        names = [(kind.__module__, kind.__name__) for kind in type(error).__mro__]
        try:
            return names, [self.encode(arg) for arg in error.args]
        except BaseException:
            return names, [describe(error)]

    def decode_exception(self, names, args):
        """The exception, as the nearest of its classes that this end knows."""
        kinds = [getattr(sys.modules.get(module), name, None) for module, name in names]
        known = (k for k in kinds if isinstance(k, type) and issubclass(k, Exception | SystemExit))
        kind = next(known, Exception)
        args = [self.decode(arg) for arg in args]
        try:
            return kind(*args)
        except Exception:  # it is made from other arguments than it keeps
            return kind.__new__(kind, *args)
