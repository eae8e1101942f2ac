"""What of the answers may take the place of a piece of a file, and what to check in it afterwards.

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

import data
import reward
from lib.config import first_line
from lib.files import unix_lines
from lib.pieces import DEFINITION, LINE, place, put, spans
from lib.sources import BROKEN, parse

INNER = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
STAR = re.compile(r"\bimport\s*\(?\s*\*")  # may define any name
placed = functools.lru_cache(place)  # taken answers are placed again with each further one
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
    """Counter of (name, signature) of all that a tree defines; a method is "Table.load"."""
    found = Counter()
    nodes = list(ast.iter_child_nodes(tree))
    for node in nodes:  # grows while it is read
        if isinstance(node, ast.ClassDef):
            found[prefix + node.name, "class"] += 1
            found += defined(node, f"{prefix}{node.name}.")
        elif isinstance(node, DEFINITION):
            found[prefix + node.name, signature(node)] += 1
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[prefix + node.id, "name"] = 1
        elif not isinstance(node, INNER):
            nodes += ast.iter_child_nodes(node)
    return found


def question(piece, text):
    """The old code of a prompt: the imports of the file `text` that the piece uses, the piece."""
    used = names(piece.code)[1] | {"*"}
    lines = [line for line, name in imports(text).items() if name.split(".")[0] in used]
    return "\n".join(lines) + "\n\n" * bool(lines) + piece.code


# ------------------------------------------------------------------------- one answer


def take(piece, answer):
    """(code for the place of a piece, {import that it needs: name}); ValueError says why not.

    It is the old code where Python sees no difference.
    """
    answer = unix_lines(answer)
    lines = answer.split("\n")
    kept = []
    for first, last, kind, name, _ in spans(parse(answer).body, lines, bool):
        if kind == piece.kind and (kind != "definition" or name == piece.name.split(".")[-1]):
            kept.append("\n".join(lines[first - 1 : last]))
    if not kept and piece.kind != "file" or len(kept) > 1 and piece.kind == "definition":
        raise ValueError(f"{piece.name} is {'there twice' if kept else 'lost'}")
    code = answer if piece.kind == "file" else "\n".join(kept)
    old, new = parse(piece.code), parse(code)
    if ast.dump(old) == ast.dump(new):
        return piece.code, {}
    found = defined(new)
    for name, _ in defined(old) - found:
        changed = name in [other for other, _ in found]
        raise ValueError(f"{name} has other arguments" if changed else f"{name} is lost")
    if piece.kind == "import" and len(imports(code)) < len(imports(piece.code)):
        raise ValueError(f"it imports fewer than {len(imports(piece.code))} names")
    body = parse("if 1:\n" * bool(piece.indent) + placed(piece, code)).body
    if ast.dump(ast.Module(body[0].body if piece.indent else body, [])) != ast.dump(new):
        raise ValueError("its strings change with its indentation")
    brought = imports(answer) if piece.kind in ("definition", "statements") else {}
    used = names(code)[1]
    return code, {line: name for line, name in brought.items() if name.split(".")[0] in used}


def place_of_imports(text, line):
    """The offset after the last import above a line, else after the docstring or first comments."""
    lines = LINE.findall(text)
    parts = spans(parse(text).body, lines, bool)
    above = next(i for i, comment in enumerate(lines) if not comment.startswith("#"))
    for first, last, kind, *_ in parts:
        docstring = kind == "text" and first == parts[0][0]
        if first < line and (docstring or kind in ("import", "future")):
            above = last
    return sum(map(len, lines[:above]))


def insert(text, taken):
    """`text` with {Piece: what take() returned}, and imports; ValueError if this breaks it."""
    changed = [(piece, *part) for piece, part in taken.items() if part[0] != piece.code]
    edits = [(piece.start, piece.end, placed(piece, code)) for piece, code, _ in changed]
    new = put(text, edits)
    brought = {line: name for *_, found in changed for line, name in found.items()}
    more = [line for line in brought if line not in imports(new)]
    if more:
        bound = Counter(names(new)[0]) + Counter(brought[line] for line in more)
        name, count = bound.most_common(1)[0]
        if count > 1:
            raise ValueError(f"{name} is something else in this file")
        first = min((piece for piece, _, found in changed if found), key=lambda piece: piece.line)
        start = place_of_imports(text, first.line)
        new = put(text, [*edits, (start, start, "".join(line + first.ending for line in more))])
    before, after = names(text)[1], names(new)[1]
    missing = after - before
    if len(missing) > len(before - after) and not STAR.search(new):  # else one for another
        raise ValueError(f"{min(missing)} is not defined")
    return new


# ------------------------------------------------------------------------- all answers


def choose(answers, check):
    """(check() of the best Answer, None where no one is usable; what became of all, a dict).

    An answer is usable if its code parses and check(code) does not refuse it. The one with the
    highest mean edit similarity to the others is taken, comments aside; ties go to the most likely.
    """
    codes = [reward.extract_code(answer.text) or "" for answer in answers]
    taken = {}  # usable code -> check(code)
    dropped = Counter()
    for code in codes:
        if not reward.strip_comments(code):
            dropped["without code"] += 1
        elif not reward.parses(code):
            dropped["that do not parse"] += 1
        else:
            try:
                taken[code] = check(code)
            except BROKEN as error:
                dropped[f"refused, as {first_line(error)}"] += 1
    plain = {}
    for code, (new, brought) in taken.items():
        plain[code] = reward.strip_comments("\n".join([*brought, new]))
    usable = [(code, answer) for code, answer in zip(codes, answers, strict=True) if code in taken]
    ranked = []
    for code, answer in usable:
        others = sum(reward.similarity(plain[code], plain[other]) for other, _ in usable) - 1
        ranked.append((others / max(len(usable) - 1, 1), answer.logp, code))
    agreement, _, best = max(ranked, default=(None, None, None))
    fate = {"answers": len(answers), "usable": len(usable), "dropped": dropped}
    fate["cut"] = sum(answer.cut for answer in answers)
    fate["agreement"] = agreement if len(usable) > 1 else None
    return taken.get(best), fate


def settle(source, asked):
    """Put the best answers into a Source; returns what became of each piece, a list of dicts.

    asked: [(Piece, its Answers)]. Imports come last, when it is clear which names are used.
    """
    taken = {}
    fates = []
    for piece, answers in sorted(asked, key=lambda item: item[0].kind == "import"):

        def check(code):
            part = take(piece, code)
            insert(source.text, taken | {piece: part}).encode(source.encoding)
            return part

        best, fate = choose(answers, check)
        taken |= {piece: best} if best else {}
        changed = best is not None and best[0] != piece.code
        fates.append({"name": piece.name, "line": piece.line, "changed": changed} | fate)
    source.new = insert(source.text, taken)
    return fates


def remarks(code):
    """Counter of the comments and docstrings in Python code."""
    nodes = [node for node in ast.walk(parse(code)) if isinstance(node, DEFINITION | ast.Module)]
    comments = [code[start:end].strip() for start, end in reward.comments(code)]
    return Counter(text for text in (*comments, *map(ast.get_docstring, nodes)) if text)


def review(example, code):
    """What to check in the new code of example.old_code, two lists.

    still_named: names in the note whose last part, `in1d` of `np.in1d`, is a name in the old code
    and in the new; not the library, and not very short ones. Some are meant to stay, e.g. a
    function whose argument was renamed. lost_remarks: comments and docstrings of the old code only.
    """
    library = example.dependency
    kept = data.names(example.old_code, library) & data.names(code, library)
    noted = dict.fromkeys(re.findall(r"[^\W\d][\w.]*\w\w", example.update_info))  # each once
    still_named = [name for name in noted if name.rpartition(".")[2] in kept]
    lost = remarks(example.old_code) - remarks(code)
    return {"still_named": still_named, "lost_remarks": list(lost.elements())}
