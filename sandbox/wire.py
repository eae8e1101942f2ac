"""The wire between a program and its judge: calls and plain values, never code.

    write(fd, data), read(fd)     one message: four bytes of length, then the data
    Peer                          one end: calls functions of the other end, answers its calls

A value crosses as a tree of numbers, strings and lists; CARRIED says how each type is taken apart and made
again. The trees are pickled, but the judge's unpickler knows no class at all, so that a forged message can
only be wrong. What has no entry (an instance of the program's own class, say) is Uncarried.

A function crosses as a number and becomes, on the other side, a function that calls back; an iterator
likewise, and is read one item at a time.
"""

import collections
import contextlib
import datetime
import decimal
import fractions
import importlib
import io
import os
import pickle
import re
import struct
import sys
import types

LONGEST = 256 << 20  # bytes of a message


class Uncarried(BaseException):
    """A value has no plain form. Like Broken not an Exception, so that no test takes it for the program's."""


class Broken(BaseException):
    """What came over the wire makes no sense, or nothing came any more."""


def write(fd, data):
    view = memoryview(struct.pack("=I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def read(fd):
    """One message of write(), as a bytearray, of which no copy stays in memory."""
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
    """Loads numbers, strings and tuples, lists and dicts of them; a pickle that names any class is refused."""

    def find_class(self, module, name):
        raise Broken(f"a message names {module}.{name}")


# ------------------------------------------------------------------------- values


def take_array(value):
    if value.dtype.kind not in "biufcSUmM":  # numbers, strings, times: nothing that holds objects
        raise Uncarried(f"not carried: an array of {value.dtype}")
    return value.dtype.str, list(value.shape), value.tobytes()


def make_array(kind, shape, data):
    np = importlib.import_module("numpy")  # not at the top: only who sends arrays needs it
    return np.frombuffer(data, np.dtype(str(kind))).reshape(shape).copy()  # frombuffer, too, refuses objects


def take_match(match):
    parts = match.re.pattern, match.re.flags, match.string, match.start(), match.endpos
    again = make_match(*parts)
    if again is None or again.regs != match.regs:
        raise Uncarried("not carried: a match that its place does not determine")
    return parts


def make_match(pattern, flags, string, start, end, compile=re.compile):  # bound here: setup may replace re.compile
    return compile(pattern, flags).match(string, start, end)


def make_tensor(array):
    return importlib.import_module("torch").from_numpy(array).clone()  # clone: its storage can be resized


def make_dtype(name):
    torch = importlib.import_module("torch")
    return next(value for value in vars(torch).values() if isinstance(value, torch.dtype) and str(value) == name)


def flat(mapping):
    return [part for pair in mapping.items() for part in pair]


def paired(parts):
    return zip(parts[::2], parts[1::2], strict=True)


LEAVES = {type(None), bool, int, float, str, bytes}  # what pickle writes without naming a class
FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set)}
CARRIED = {  # type: (its parts, which are carried in turn; the value made of them)
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
    "collections.deque": (lambda v: (v.maxlen, *v), lambda n, *parts: collections.deque(parts, n)),
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
    "scalars": (None, lambda key, array: CARRIED[key][1](*array)),  # many numpy.generic of one type, all at once
    "torch.Tensor": (lambda v: [v.detach().numpy()], make_tensor),
    "torch.Size": (tuple, lambda *parts: importlib.import_module("torch").Size(parts)),
    "torch.dtype": (lambda v: [str(v)], make_dtype),
}
MUTABLE = {"builtins.list", "builtins.set", "builtins.dict", "builtins.bytearray", "numpy.ndarray", "torch.Tensor"}


def key_of(value):
    """The name of the value's type in CARRIED, if it is there; exact types only, but for numpy's scalars."""
    kind = type(value)
    scalar = isinstance(value, getattr(sys.modules.get("numpy"), "generic", ()))
    return "numpy.generic" if scalar else f"{kind.__module__}.{kind.__qualname__}"


def assign(old, new):
    """Make `old`, a mutable value of the judge's, equal to `new`."""
    if hasattr(old, "clear"):
        old.clear()
        (old.extend if hasattr(old, "extend") else old.update)(new)
    else:
        old[...] = new


# ------------------------------------------------------------------------- calls


class Peer:
    """One end of the wire. `handles` are the functions of this end that the other end may call, by index.

    An end that `trusts` takes modules, classes and functions of libraries by their names: the program's end,
    and the judge's while it asks for what the test did not import itself.
    """

    def __init__(self, reads, writes, trusts=False):
        self.reads, self.writes, self.trusts, self.handles = reads, writes, trusts, []
        self.doubt = ""  # why the judge's verdict may be wrong: a value not carried, an argument changed
        self.failed = False  # a call ended in Uncarried or Broken

    def encode(self, value):
        """The tree of a value."""
        if type(value) in LEAVES:
            return value
        if (key := key_of(value)) in CARRIED:
            parts = list(CARRIED[key][0](value))
            kinds = set(map(type, parts))
            if kinds <= LEAVES:
                return key, parts
            if len(kinds) == 1 and len(parts) > 99 and key_of(parts[0]) == "numpy.generic":
                return "scalars", [key, self.encode(importlib.import_module("numpy").array(parts))]
            return key, [part if type(part) in LEAVES else self.encode(part) for part in parts]
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        if hasattr(value, "__next__"):
            self.handles.append(lambda: next(value))
            return "iterator", len(self.handles) - 1
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not callable(value):
            raise Uncarried(f"not carried: a {key}")
        if module in sys.modules and getattr(sys.modules[module], str(name), None) is value and module not in OURS:
            return "named", [module, name]
        if type(value).__module__ != "builtins":
            raise Uncarried(f"not carried: a {key}")
        self.handles.append(value)
        return "function", len(self.handles) - 1

    def decode(self, tree):
        """The value of a tree."""
        if type(tree) in LEAVES:
            return tree
        key, parts = tree
        if key in CARRIED:
            return CARRIED[key][1](*[part if type(part) in LEAVES else self.decode(part) for part in parts])
        if key == "function":
            return self.remote(parts)
        if key == "iterator":
            return self.iterate(parts)
        if not self.trusts:
            raise Uncarried(f"not carried: the {key} {parts}")
        if key == "named":
            return getattr(sys.modules[parts[0]], parts[1])
        known = parts in sys.modules or parts.partition(".")[0] in sys.stdlib_module_names
        return importlib.import_module(parts) if known else None

    def remote(self, handle):
        def program(*args, **kwargs):
            try:
                return self.call(handle, args, kwargs)
            except StopIteration:  # would end a loop over map(program, ...) in the test, as if all were well
                raise RuntimeError("the program raised StopIteration") from None

        return program

    def iterate(self, handle):
        while True:
            try:
                yield self.call(handle, (), {})
            except StopIteration:
                return

    def send(self, *message):
        data = pickle.dumps(message, protocol=5)
        if len(data) > LONGEST:
            raise Uncarried("not carried: too much data")
        write(self.writes, data)

    def receive(self):
        return Plain(io.BytesIO(read(self.reads))).load()

    def call(self, handle, args, kwargs):
        """The value, or the exception, of the other end's function number `handle`; Uncarried or Broken."""
        try:
            self.send("call", handle, [self.encode(arg) for arg in args], self.encode(kwargs))
            while (message := self.receive())[0] == "call":  # it calls a function that it got as an argument
                self.answer(*message[1:])
            kind, result, changed = message
            if kind == "uncarried":
                raise Uncarried(f"not carried: {result}")
            result = self.decode_exception(*result) if kind == "raise" else self.decode(result)
            self.doubt = "an argument was changed" if changed else self.doubt
            for i, new in changed.items() if result is None else ():  # what changes in place returns nothing, and
                assign(args[i], self.decode(new))  # what returns something does not get at the test's own values
        except BaseException as error:
            self.doubt, self.failed = describe(error), True
            raise error if isinstance(error, Uncarried) else Broken(self.doubt) from None
        if kind == "raise":
            raise result
        return result

    def answer(self, handle, args, kwargs):
        """Run the call of the other end; send its outcome and those arguments that it changed in place."""
        try:
            values = [self.decode(arg) for arg in args]
            result = self.encode(self.handles[handle](*values, **self.decode(kwargs)))
            after = {i: self.encode(value) for i, value in enumerate(values) if key_of(value) in MUTABLE}
            reply = "value", result, {i: new for i, new in after.items() if new != args[i]}
        except Uncarried as error:
            reply = "uncarried", str(error).removeprefix("not carried: "), {}
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
        """As the nearest class that this end has, too."""
        kinds = [getattr(sys.modules.get(module), name, None) for module, name in names]
        known = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception | SystemExit))
        kind = next(known, Exception)
        args = [self.decode(arg) for arg in args]
        try:
            return kind(*args)
        except Exception:  # it is made from other arguments than it keeps
            return kind.__new__(kind, *args)


OURS = ("program", "checks")  # the modules in which the two ends run what they are given
