from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

DECOMPOSITIONS = ("linalg_svd", "linalg_eig", "linalg_qr", "linalg_chol", "linalg_lu", "svd", "geqrf")


class NoDecomposition(TorchDispatchMode):
    """A context in which every matrix decomposition raises, by whatever name it was called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").lstrip("_")
        if name.startswith(DECOMPOSITIONS):
            raise AssertionError(f"{func} was called where no decomposition is allowed")
        return func(*args, **(kwargs or {}))
