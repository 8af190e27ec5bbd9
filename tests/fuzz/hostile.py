"""Text and values that would do harm if a reader ran, imported, opened or trusted them.

Text that is code contains `MARK`, and creates a file in the decoy folder when it runs: the guard finds both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

MARK = "zqx"  # in no name of any package: compiled text that contains it is text of a file
MODULE = "zqx_evil"  # a Python file in every case directory


class Hostile(NamedTuple):
    """Words to put in place of text, and values (objects, nodes, entries) to put anywhere in a tree."""

    words: tuple[str, ...]
    values: tuple[Any, ...]


def evil(decoy: Path) -> str:
    """The text of a Python file that leaves a trace when it runs."""
    return f"open({str(decoy / 'zqx_hit')!r}, 'w').close()\n\n\ndef build():\n    raise SystemExit('zqx')\n"


def hostile(decoy: Path) -> Hostile:
    """Hostile words and values; `decoy` is the folder that nothing may touch."""
    hit = f"open({str(decoy / 'zqx_hit')!r}, 'w').close()"
    system = f"touch {decoy / 'zqx_hit'}"
    code = (
        f"__import__('os').system({system!r})",
        f"exec({hit!r})",
        f"x):\n    {hit}\n    return (x",
        f"x={hit}",
        f"zqx = {hit}\nx",
        f"\n{hit}\n#",
        f"'+str({hit})+'",
        f'"]; {hit}; ["',
        f"!!python/object/apply:os.system [{system!r}]",
    )
    paths = (
        str(decoy / "secret.bin"),
        str(decoy / "secret.safetensors"),
        "../decoy/secret.bin",
        "../decoy/secret.safetensors",
        "../../decoy/secret.bin",
        "../../x",
        "/etc/passwd",
        "/proc/self/environ",
        "*/_ORT_MEM_ADDR_/*",
        "http://127.0.0.1:9/zqx",
        ".",
        "..",
        "/",
    )
    names = (
        "os.system",
        "posix.system",
        "builtins.exec",
        "builtins.eval",
        "builtins.__import__",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "_operator.itemgetter",
        "_operator.call",
        "operator.attrgetter",
        "math.comb",
        "torch.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.empty.memory_format",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten.as_strided.default",
        "torch.ops.load_library",
        "__class__",
        "__reduce_ex__",
        "__globals__",
        "__init__",
        "_modules",
        "apply_",
        "register_hook",
        "resize_",
        "zqx_evil",
        "zqx_evil.py",
        "zqx_evil.build",
        "zqx_evil:build",
        "turtledemo.clock",
        "idlelib.run",
        "this",
        "antigravity",
        "enum.Enum",
        "call_module",
        "call_method",
        "huggingface",
        "python",
        "graph",
        "AutoModel",
        "PreTrainedModel",
        "Trainer",
        "pipeline",
        "EPContext",
        "PythonOp",
    )
    odd = (
        "",
        " ",
        "\0",
        "a\0b",
        "\uff41\uff44\uff44",
        "\ufb01eld",
        "\u202ezqy",
        "\ud800",
        "zqy",
        "class",
        "None",
        "lambda",
        "%s%n",
        "{0.__class__}",
        "{{ zqy.__class__ }}",
        "a" * 100_000,
        "x." * 5_000,
        "9" * 5_000,
        "\u0661\u0662",
        "1e400",
        "NaN",
        "batch * 99999999999",
        "sequence + " * 3_000 + "1",
    )
    values: tuple[Any, ...] = (
        {"auto_map": {"AutoConfig": f"{MODULE}.Config", "AutoModelForCausalLM": f"{MODULE}.build"}},
        {"kind": "huggingface", "code": f"{MODULE}.py", "builder": "build"},
        {"kind": "python", "code": f"{MODULE}.py", "builder": "build"},
        {"kind": "python", "code": f"../decoy/{MODULE}.py", "builder": "build"},
        ["zqy", "call_function", "torch.ops.aten.from_file.default", [str(decoy / "secret.bin"), False, 16], {}],
        ["zqy", "call_function", "_operator.methodcaller", ["__reduce_ex__", 4], {}],
        ["zqy", "call_function", "_operator.pow", [10, 10_000_000_000], {}],
        ["zqy", "call_method", "__class__", [{"node": "x"}], {}],
        ["zqy", "call_method", "numpy", [{"node": "x"}], {}],
        ["zqy", "placeholder", f"x={hit}", [], {}],
        ["zqy", "get_attr", "forward.__globals__", [], {}],
        {"type": "builtins.tuple", "context": "null", "children_spec": []},
        {"type": f"{MODULE}.Spec", "context": "null", "children_spec": []},
        {"type": "builtins.dict", "context": f'[{{"__enum__": true, "fqn": "{MODULE}.E", "name": "A"}}]', "children_spec": []},
        {"tuple": [{"node": "x"}]},
        {"node": "zqy"},
        {"device": "cuda:99"},
        {"dtype": "nn"},
        {"float": "inf"},
        {"any": True},
        *({"zqy": word} for word in code[:3]),
    )
    return Hostile((*code, *paths, *names, *odd), values)
