"""What of the answers may take the place of a piece of a file.

There is no reference, and nothing is run. Of an answer to a definition the definition of that name
is taken, of an answer to an import its imports, to statements all but its imports. It must define
what the piece defines, with the same arguments, and need no name that nothing defines.
"""

import ast
import builtins
import functools
import re
import symtable
import warnings
from collections import Counter

import reward
from lib.config import first_line
from lib.pieces import DEFINITION, cut, place, spans, split
from lib.sources import BROKEN, parse

INNER = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
BINDING = re.compile(r"property|staticmethod|classmethod|\w+\.(?:getter|setter|deleter)")

# ------------------------------------------------------------------------- what code says


@functools.lru_cache
def imports(code):
    """{statement: name that it binds} of the imports in some code, a statement for each name."""
    found = {}
    for node in ast.walk(parse(code)):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            single = ast.Import([alias])
            if isinstance(node, ast.ImportFrom):
                single = ast.ImportFrom(node.module, [alias], node.level)
            found[ast.unparse(single)] = alias.asname or alias.name
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


# ------------------------------------------------------------------------- one answer


def take(piece, answer):
    """(new text of a piece, {import that it needs: name}); ValueError says why there is none.

    It is the old text where Python sees no difference.
    """
    code = reward.extract_code(answer.text) or ""
    if not reward.strip_comments(code):
        raise ValueError("it is cut" if answer.cut else "it has no code")
    kept = []
    for part in cut(code, whole=piece.kind == "file"):
        same_name = part.name == piece.name.split(".")[-1]
        if part.kind == piece.kind and (same_name or part.kind != "definition"):
            kept.append(part.code)
    if not kept or len(kept) > 1 and piece.kind == "definition":
        raise ValueError(f"{piece.name} is {'there twice' if kept else 'lost'}")
    brought = imports(code)
    code = "\n".join(kept)
    old, new = parse(piece.code), parse(code)
    if ast.dump(old) == ast.dump(new):
        return piece.old, {}
    for name, _ in sorted(defined(old) - defined(new)):
        changed = name in dict(defined(new))
        raise ValueError(f"{name} has other arguments" if changed else f"{name} is lost")
    if piece.kind == "import" and len(imports(code)) < len(imports(piece.code)):
        raise ValueError(f"it imports fewer than {len(imports(piece.code))} names")
    placed = place(piece, code)
    body = parse(f"if 1:\n{placed}").body[0].body if piece.indent else parse(placed).body
    if ast.dump(ast.Module(body, [])) != ast.dump(new):
        raise ValueError("its strings change with its indentation")
    used = names(code)[1]
    return placed, {line: name for line, name in brought.items() if name.split(".")[0] in used}


def place_of_imports(text):
    """The offset after the docstring and the imports at the top, or after the first comments."""
    lines = split(text)
    above = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    for piece in spans(parse(text).body, lines):
        if piece.kind not in ("text", "future", "import"):
            break
        above = piece.last
    return len("".join(lines[:above]))


def insert(text, taken):
    """`text` with {Piece: what take() returned}, and imports; ValueError if this breaks it."""
    new = text
    brought = {}
    for piece in sorted(taken, key=lambda piece: -piece.start):
        code, needed = taken[piece]
        new = new[: piece.start] + code + new[piece.start + len(piece.old) :]
        brought = needed | brought
    present = imports(new)
    bound = set(names(new)[0])
    more = ""
    for line, name in brought.items():
        if line not in present:
            if name in bound:
                raise ValueError(f"{name} is something else in this file")
            bound.add(name)
            more += line + piece.ending
    if more:
        start = place_of_imports(new)
        new = new[:start] + more + new[start:]
    missing = names(new)[1] - names(text)[1]
    if missing and "*" not in present.values():  # which may define any name
        raise ValueError(f"{min(missing)} is not defined")
    return new


# ------------------------------------------------------------------------- all answers


def choose(usable):
    """(the best of [(what take() returned, log-probability)], its agreement or None if alone).

    The best has the highest mean edit similarity to the others, comments aside; ties go to the most
    likely.
    """
    texts = [reward.strip_comments("\n".join([*brought, code])) for (code, brought), _ in usable]
    ranked = []
    for text, (part, logp) in zip(texts, usable, strict=True):
        others = sum(reward.similarity(text, other) for other in texts) - 1
        ranked.append((others / max(len(texts) - 1, 1), logp, part))
    agreement, _, best = max(ranked, key=lambda item: item[:2])
    return best, agreement if len(texts) > 1 else None


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
        fate = {"name": piece.name, "line": piece.line, "changed": False, "agreement": None}
        if usable:
            taken[piece], fate["agreement"] = choose(usable)
            fate["changed"] = taken[piece][0] != piece.old
        fates.append(fate | {"answers": len(answers), "usable": len(usable), "dropped": dropped})
    source.new = insert(source.text, taken)
    return fates
