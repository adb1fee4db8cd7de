"""Call your own transforms (`augment.transforms`), with random numbers that follow from (seed, epoch, index).

Transforms draw from global generators, which all threads share. For torch's, a mode of the thread passes a generator of
the image to each random function. For NumPy's and Python's, one image at a time is transformed, with both generators
seeded by the image and restored afterwards. The states show whether transforms draw from them.
"""

import contextlib
import logging
import random
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alexlab.engine.errors import UserError

NAMES = """rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson binomial
_standard_gamma _sample_dirichlet uniform_ normal_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_"""
RANDOM = {getattr(owner, name) for owner in (torch, Tensor) for name in NAMES.split() if hasattr(owner, name)}

log = logging.getLogger("alexlab")


class SeededTorch(TorchFunctionMode):
    """Let torch's random functions draw from a generator with this seed, in this thread."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, FunctionType):  # Python code, such as dropout: this mode does not see the calls inside
            with SeededOperations(self.generator):
                return func(*args, **kwargs)
        return func(*args, **(_with(self.generator, kwargs) if func in RANDOM else kwargs))


class SeededOperations(TorchDispatchMode):
    """`SeededTorch` for the operations inside of functions, with more overhead. Raises if one takes no generator."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(_with(self.generator, kwargs) if is_random else kwargs))


def _with(generator: torch.Generator, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "generator": kwargs.get("generator") or generator}


class GlobalGenerators:
    """NumPy's and Python's global generators: threads run together without them, or one thread alone with them."""

    def __init__(self) -> None:
        self.entrance, self.left, self.together = threading.Lock(), threading.Condition(), 0
        self.states = _states()

    @contextlib.contextmanager
    def unused(self) -> Iterator[Callable[[], bool]]:
        """Run in parallel with threads that do the same; yield a function that checks whether a generator was used."""
        with self.entrance, self.left:
            self.together += 1
        try:
            yield lambda: _states() != self.states
        finally:
            with self.left:
                self.together -= 1
                self.left.notify_all()

    @contextlib.contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Run alone, with seeded generators."""
        with self.entrance:
            with self.left:
                self.left.wait_for(lambda: self.together == 0)
            of_python, of_numpy = random.getstate(), np.random.get_state()
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)
            try:
                yield
            finally:
                random.setstate(of_python)
                np.random.set_state(of_numpy)
                self.states = _states()


def _states() -> tuple[Any, ...]:
    numpys: Any = np.random.get_state()
    return random.getstate(), numpys[1].tobytes(), *numpys[2:]


GENERATORS = GlobalGenerators()  # a process has one of each


class UserTransforms:
    """Callables that each get and return a uint8 tensor (C, H, W), for one image after another."""

    def __init__(self, transforms: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.transforms = tuple(transforms)
        self.alone = False  # whether the transforms have drawn from NumPy's or Python's global generator

    def __call__(self, image: Tensor, size: tuple[int, ...], seed: int) -> Tensor:
        """Transform a uint8 image (C, H, W), which is not changed, to (C, *size).

        Raises:
            UserError: a transform returns something else.
        """
        if not self.alone:
            with GENERATORS.unused() as was_used:
                transformed = self._apply(image, size, seed)
                if not was_used():
                    return transformed
        with GENERATORS.seeded(seed):
            seeded = None if self.alone else _states()
            transformed = self._apply(image, size, seed)
            if not self.alone and _states() != seeded:  # by the transforms, not by another thread
                self.alone = True
                log.info(
                    "augment.transforms draw from NumPy's or Python's global generator, so one image at a time is "
                    "transformed; torch's generator has no such limit"
                )
        return transformed

    def _apply(self, image: Tensor, size: tuple[int, ...], seed: int) -> Tensor:
        threads, seeded = torch.get_num_threads(), SeededTorch(seed)
        if threads > 1:  # sums of floats depend on the number; the threads of a loader use one
            torch.set_num_threads(1)
        try:
            image = image.clone()
            for i, transform in enumerate(self.transforms):
                name = f"augment.transforms[{i}] ({name_of(transform)})"
                try:
                    with seeded:
                        result = transform(image)
                except Exception as error:  # the loader would take an OSError for that of a broken image
                    raise failure(name, error) from error
                is_image = isinstance(result, Tensor) and result.dtype == torch.uint8 and result.ndim == 3
                wanted = size if i == len(self.transforms) - 1 else result.shape[1:] if is_image else ("H", "W")
                if not is_image or result.shape != (len(image), *wanted):
                    shape = ", ".join(map(str, (len(image), *wanted)))
                    raise UserError(f"{name} returned {described(result)}, and must return a uint8 tensor ({shape}).")
                image = result
        finally:
            if threads > 1:
                torch.set_num_threads(threads)
        return image


def failure(name: str, error: Exception) -> RuntimeError:
    """Return an error that names the transform and the line that failed."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if line.filename != __file__]
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    return RuntimeError(f"{name} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}{place}")


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def described(value: Any) -> str:
    return f"{value.dtype} {(*value.shape,)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
