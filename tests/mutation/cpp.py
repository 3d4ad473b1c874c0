"""Small wrong changes to the device code of C++ sources, found in their tokens.

Nothing in here knows what the kernels do. It relies on the layout of the sources: binary operators
stand between spaces, those of types and templates do not.
"""

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .mutator import Mutant

# Functions that run on a GPU are marked with one of these.
DEVICE = ("__global__", "__device__", "PGOLF_HOST_DEVICE")
NOT_NAMES = ("__launch_bounds__", "alignas", "decltype", "if", "for", "while", "switch")
TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:\\\n|[^\n])*)
    |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>(?:0[xX][0-9a-fA-F']+|(?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[uUlLfF]*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<sign><<=|>>=|->|::|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
BINARY = {
    "+": ["-"], "-": ["+"], "*": ["+"], "/": ["*"], "%": ["/"], "<<": [">>"], ">>": ["<<"],
    "&": ["|"], "|": ["&"], "^": ["|"], "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="],
    ">=": [">", "<"], "==": ["!="], "!=": ["=="], "&&": ["||"], "||": ["&&"], "+=": ["-=", "="],
    "-=": ["+="], "*=": ["+="], "/=": ["*="], "|=": ["&="], "&=": ["|="],
}  # fmt: skip
RENAMED = {
    "true": "false", "false": "true", "max": "min", "min": "max", "fmaxf": "fminf",
    "fminf": "fmaxf", "__shfl_xor_sync": "__shfl_down_sync", "__shfl_down_sync": "__shfl_up_sync",
    "__any_sync": "__all_sync", "__all_sync": "__any_sync", "threadIdx": "blockIdx",
    "blockDim": "gridDim",
}  # fmt: skip
# Statements whose change is refused by the compiler, or none: more room in shared memory.
INERT = ("static_assert", "__shared__", "using")
DECLARES = (
    "const", "constexpr", "auto", "using", "static", "typename", "static_assert", "return",
    "struct", "alignas", "__shared__",
)  # fmt: skip


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Function:
    """A function of device code: tokens[begin] is its opening brace, tokens[end] the closing."""

    name: str
    begin: int
    end: int
    is_kernel: bool


def tokens(source: str) -> list[Token]:
    """All but spaces, comments and lines of the preprocessor."""
    found = [Token(m.lastgroup, m.group(), m.start()) for m in TOKEN.finditer(source)]
    return [token for token in found if token.kind != "skip"]


def functions(words: list[Token]) -> list[Function]:
    """The device functions, members of structs too."""
    found, outside, i = [], 0, 0
    while i < len(words):
        text = words[i].text
        if text == "{":
            declaration = [w.text for w in words[outside:i]]
            if words[i - 1].text in (")", "const") and any(d in declaration for d in DEVICE):
                end = _closing(words, i)
                kernel = "__global__" in declaration
                found.append(Function(_name(declaration), i, end, kernel))
                i = end
            elif not {"namespace", "struct", "class"} & set(declaration):
                i = _closing(words, i)  # host code, initialisers
        if words[i].text in "{};":
            outside = i + 1
        i += 1
    return found


def mutants(module: str, source: str, wanted: Collection[str]) -> list[Mutant]:
    """Every mutant of these device functions of a file, in the order of its text."""
    words = tokens(source)
    result: dict[str, Mutant] = {}
    for function in functions(words):
        if function.name not in wanted:
            continue
        for at, start, end, new in _changes(words, function, source):
            first, last = _statement(words, at, function)
            begin, stop = words[first].start, words[last].end
            changed = source[begin:start] + new + source[end:stop]
            text = f"{_one_line(source[begin:stop])} => {_one_line(changed) or 'nothing'}"
            key = f"{function.name}: {text}"
            while key in result:  # the same change of the same words elsewhere
                key, text = f"{key} (again)", f"{text} (again)"
            line = source.count("\n", 0, start) + 1
            whole = source[:start] + new + source[end:]
            result[key] = Mutant(module, function.name, text, line, whole)
    return list(result.values())


def _changes(
    words: list[Token], function: Function, source: str
) -> Iterator[tuple[int, int, int, str]]:
    """(token, start, end, what takes the place of source[start:end])"""
    inert = False
    for i in range(function.begin + 1, function.end):
        word, before, after = words[i], words[i - 1], words[i + 1]
        if before.text in ("{", "}", ";"):
            inert = any(w.text in INERT for w in words[i : _statement(words, i, function)[1]])
        if inert:
            continue
        spaced = source[word.start - 1] in " \n" and source[word.end] in " \n"
        if _begins_statement(words, i):
            last = _end_of_statement(words, i)
            if last and _may_be_dropped(words[i:last]):
                yield i, word.start, words[last].start, ""
        if word.text in BINARY and spaced:
            for other in BINARY[word.text]:
                yield i, word.start, word.end, other
        elif word.text in ("-", "!", "~") and before.kind == "sign" and before.text not in ")]":
            yield i, word.start, word.end, ""
        elif word.text == "[" and before.kind == "word" and after.text not in ("&", "=", "]"):
            close = words[_closing(words, i)]
            yield i, close.start, close.start, " + 1"
        elif word.text in RENAMED and before.text not in (".", "->"):
            yield i, word.start, word.end, RENAMED[word.text]
        elif word.kind == "number":
            for other in _other_numbers(word.text):
                yield i, word.start, word.end, other
        elif word.text == "if" and after.text == "(":
            close = words[_closing(words, i + 1)]
            yield i, after.end, close.start, f"!({source[after.end : close.start]})"
        if word.text.startswith("__shfl") and after.text == "(":
            yield from _shuffle_arguments(words, i)


def _shuffle_arguments(words: list[Token], i: int) -> Iterator[tuple[int, int, int, str]]:
    """The mask names all lanes or only the lowest, and the width is a warp's."""
    close, depth, commas = _closing(words, i + 1), 0, []
    for j in range(i + 2, close):
        depth += (words[j].text in "([{") - (words[j].text in ")]}")
        if words[j].text == "," and depth == 0:
            commas.append(words[j])
    for mask in ("~0u", "1u"):
        yield i, words[i + 2].start, commas[0].start, mask
    if len(commas) == 3:
        yield i, commas[2].start, words[close].start, ""


def _other_numbers(text: str) -> list[str]:
    is_hex = text.startswith(("0x", "0X"))
    digits = text.rstrip("uUlL" if is_hex else "uUlLfF")
    suffix = text[len(digits) :]
    if is_hex:
        return [hex(int(digits.replace("'", ""), 16) >> 1) + suffix]
    if "." in digits or "e" in digits or "f" in suffix.lower():
        return [f"{2 * float(digits) or 1.0}{suffix}"]
    value = int(digits.replace("'", ""))
    return [f"{value + 1}{suffix}", *([f"0{suffix}"] if value == 1 else [])]


def _begins_statement(words: list[Token], i: int) -> bool:
    before = words[i - 1].text
    if before == ")":  # of a condition?
        opening = _opening(words, i - 1)
        return words[opening - 1].text in ("if", "for", "while", "constexpr")
    return before in ("{", "}", ";", "else")


def _end_of_statement(words: list[Token], i: int) -> int:
    """The semicolon of a simple statement that begins at i; 0 where a block or for begins."""
    if words[i].text in ("for", "if", "while", "else", "{", "}", ";"):
        return 0
    while words[i].text != ";":
        i = _closing(words, i) + 1 if words[i].text in "([{" else i + 1
        if words[i].text == "}":
            return 0
    return i


def _may_be_dropped(statement: list[Token]) -> bool:
    """A call, an assignment, a jump: not what makes names known."""
    texts = [word.text for word in statement]
    if texts[0] in DECLARES or statement[0].kind not in ("word", "sign"):
        return False
    two_names = len(statement) > 1 and statement[0].kind == statement[1].kind == "word"
    known = texts[0] in ("break", "continue") or any(
        sign in texts for sign in ("(", "=", "+=", "-=", "*=", "/=", "|=", "&=", "++", "--")
    )
    return known and not two_names and not re.match(r"\w+ [*&] (const )?\w+ =", " ".join(texts))


def _statement(words: list[Token], i: int, function: Function) -> tuple[int, int]:
    """The first and the last token of what to show of a change at token i."""
    first = i
    while first - 1 > function.begin and words[first - 1].text not in ("{", "}", ";"):
        first -= 1
    last = i
    while last + 1 < function.end and words[last + 1].text not in ("{", "}", ";"):
        last += 1
    return first, last


def _one_line(text: str) -> str:
    return " ".join(re.sub(r"//[^\n]*|^\s*#[^\n]*", "", text, flags=re.MULTILINE).split())


def _name(declaration: list[str]) -> str:
    depth = 0  # what is called in the arguments of an attribute is not the name
    for text, after in itertools.pairwise(declaration):
        depth += (text == "(") - (text == ")")
        if not depth and after == "(" and re.match(r"[A-Za-z_]", text) and text not in NOT_NAMES:
            return text
    return "?"


def _closing(words: list[Token], i: int) -> int:
    depth = 0
    for j in range(i, len(words)):
        if words[j].kind == "sign":
            depth += (words[j].text in "([{") - (words[j].text in ")]}")
        if depth == 0:
            return j
    raise ValueError(f"no end of the bracket at {words[i].start}")


def _opening(words: list[Token], i: int) -> int:
    depth = 0
    for j in range(i, -1, -1):
        if words[j].kind == "sign":
            depth += (words[j].text in ")]}") - (words[j].text in "([{")
        if depth == 0:
            return j
    raise ValueError(f"no beginning of the bracket at {words[i].start}")
