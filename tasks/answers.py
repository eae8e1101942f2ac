"""What of the answers may take the place of a piece of a file.

Nothing is run. Of an answer to a definition the definition of that name is taken, to an import its
imports, to statements all but its imports. It must define what the piece defines, with the same
arguments, and need no name that nothing defines.
"""

import ast
import builtins
import functools
import io
import re
import symtable
import warnings
from collections import Counter

import reward
from lib.config import first_line
from lib.pieces import DEFINITION, cut, indent, kind_of
from lib.sources import BROKEN, parse

INNER = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
BINDING = re.compile(r"property|staticmethod|classmethod|\w+\.(?:getter|setter|deleter)")


@functools.lru_cache
def imports(code):
    """{statement: name that it binds} of the imports in some code, a statement for each name."""
    found = {}
    for node in ast.walk(parse(code)):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            node.names = [alias]
            found[ast.unparse(node)] = alias.asname or alias.name
    return found


@functools.lru_cache
def names(code):
    """(names that code binds at its top level, names that it takes from elsewhere), two sets."""
    with warnings.catch_warnings(action="ignore"):
        tables = [symtable.symtable(code, "code", "exec")]
    bound = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    used = set()
    for table in tables:  # grows while it is read
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return bound, used - bound - set(dir(builtins))


def identifiers(code, library):
    """The set of all identifiers in Python code, without the library's own and its import aliases.

    np.linalg.norm has linalg and norm. `code` must parse.
    """
    with warnings.catch_warnings(action="ignore"):  # odd escapes in strings
        nodes = list(ast.walk(ast.parse(code)))
    found = set()
    own = {library.lower()}
    for node in nodes:
        for field in ("id", "attr", "arg", "name", "module", "asname"):
            found.update((getattr(node, field, None) or "").split("."))
        if isinstance(node, ast.alias) and node.name.split(".")[0].lower() == library.lower():
            own.update((node.name.lower(), (node.asname or node.name).lower()))
    return {name for name in found if name and name.lower() not in own}


def signature(function):
    """How a function is called, as text: without annotations and the values of defaults."""
    found = [type(function).__name__]
    found += filter(BINDING.fullmatch, map(ast.unparse, function.decorator_list))
    for field, value in ast.iter_fields(function.args):
        for each in value if isinstance(value, list) else [value]:
            found.append(f"{field} {getattr(each, 'arg', each is not None)}")
    return ", ".join(found)


def defined(tree, prefix=""):
    """{(name, how it is called)} of all that a tree defines; a method is "Table.load"."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            found |= {(prefix + node.name, "class")} | defined(node, f"{prefix}{node.name}.")
        elif isinstance(node, DEFINITION):
            found.add((prefix + node.name, signature(node)))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add((prefix + node.id, "name"))
        elif not isinstance(node, INNER):
            found |= defined(node, prefix)
    return found


def question(piece, text):
    """The old code of a prompt: the imports of the file `text` that the piece uses, the piece."""
    used = names(piece.code)[1] | {"*"}
    lines = [line for line, name in imports(text).items() if name.split(".")[0] in used]
    return "\n".join(lines) + "\n\n" * bool(lines) + piece.code


def take(piece, answer):
    """(new text of a piece, {import that it needs: name}); ValueError says why there is none.

    It is the old text where Python sees no difference.
    """
    answered = reward.extract_code(answer.text) or ""
    if not reward.strip_comments(answered):
        raise ValueError("it was cut" if answer.cut else "it has no code")
    parts = [part for part in cut(answered, whole=piece.kind == "file") if part.kind == piece.kind]
    if piece.kind == "definition":
        parts = [part for part in parts if part.name == piece.name.split(".")[-1]][-1:]
    code = "\n".join(part.code for part in parts)
    if not code:
        raise ValueError(f"{piece.name} is lost")
    old, new = parse(piece.code), parse(code)
    if ast.dump(old) == ast.dump(new):
        return piece.old, {}
    for name, _ in sorted(defined(old) - defined(new)):
        changed = name in dict(defined(new))
        raise ValueError(f"{name} has other arguments" if changed else f"{name} is lost")
    if piece.kind == "import" and len(imports(code)) < len(imports(piece.code)):
        raise ValueError(f"it imports fewer than {len(imports(piece.code))} names")
    placed = indent(code, piece.indent, piece.code)
    body = parse(f"if 1:\n{placed}").body[0].body if piece.indent else new.body
    if ast.dump(ast.Module(body, [])) != ast.dump(new):
        raise ValueError("its strings change with its indentation")
    used = names(code)[1]
    needed = {line: name for line, name in imports(answered).items() if name.split(".")[0] in used}
    return placed.replace("\n", piece.ending), needed


def place_of_imports(text):
    """The offset after the docstring and the imports at the top, or after the first comments."""
    lines = io.StringIO(text, newline="").readlines()
    above = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    for node in parse(text).body:
        if kind_of(node) not in ("text", "import"):
            break
        above = node.end_lineno
    return len("".join(lines[:above]))


def insert(text, taken):
    """`text` with {Piece: what take() returned}, and imports; ValueError if this breaks it."""
    new = text
    needed = {}
    for piece in sorted(taken, key=lambda piece: -piece.start):
        code, imported = taken[piece]
        new = new[: piece.start] + code + new[piece.start + len(piece.old) :]
        needed = imported | needed
    more = {line: name for line, name in needed.items() if line not in imports(new)}
    if more:
        name, count = Counter([*names(new)[0], *more.values()]).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{name} is something else in this file")
        start = place_of_imports(new)
        new = new[:start] + "".join(line + piece.ending for line in more) + new[start:]
    missing = names(new)[1] - names(text)[1]
    if missing and "*" not in imports(new).values():  # which may define any name
        raise ValueError(f"{min(missing)} is not defined")
    parse(new)
    return new


def choose(usable):
    """(the best of [(what take() returned, log-probability)], its agreement or None if alone).

    Agreement is the mean edit similarity to the others, comments aside; ties go to the likeliest.
    """
    texts = [reward.strip_comments("\n".join([*needed, code])) for (code, needed), _ in usable]
    totals = [sum(reward.similarity(text, other) for other in texts) - 1 for text in texts]
    best = max(range(len(texts)), key=lambda i: (totals[i], usable[i][1]))
    return usable[best][0], totals[best] / (len(texts) - 1) if len(texts) > 1 else None


def settle(source, asked):
    """Put the best answers into a Source; returns what became of each piece, a list of dicts.

    asked: [(Piece, its Answers)]. Imports come last, when it is clear which names are used.
    """
    taken = {}
    fates = []
    for piece, answers in sorted(asked, key=lambda item: item[0].kind == "import"):
        usable = []
        dropped = Counter()
        for answer in answers:
            try:
                part = take(piece, answer)
                insert(source.text, taken | {piece: part}).encode(source.encoding)
                usable.append((part, answer.logp))
            except BROKEN as error:
                dropped[getattr(error, "msg", first_line(error))] += 1
        taken[piece], agreement = choose(usable) if usable else ((piece.old, {}), None)
        changed = taken[piece][0] != piece.old
        fate = {"name": piece.name, "line": piece.line, "changed": changed, "agreement": agreement}
        fates.append(fate | {"answers": len(answers), "usable": len(usable), "dropped": dropped})
    source.new = insert(source.text, taken)
    return fates
