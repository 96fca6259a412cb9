"""Fail if vastai.py imports anything outside the standard library, at its top, in a function or by a name in quotes."""
import ast
import sys


def imports(tree):
    """(line, module) of every import; a relative one counts as "." for there is no package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("__import__", "import_module"):
                yield node.lineno, node.args[0].value


with open(sys.argv[1], encoding="utf-8") as file:
    found = list(imports(ast.parse(file.read())))
foreign = [(line, name) for line, name in found if name.partition(".")[0] not in sys.stdlib_module_names]
for line, name in foreign:
    print(f"{sys.argv[1]}:{line}: {name} is not in the standard library")
print(f"{len(found)} imports, {len(foreign)} from outside the standard library")
sys.exit(bool(foreign) or not found)
