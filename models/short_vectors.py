"""Arithmetic on a few numbers that lie side by side at an address, as vector instructions of the processor.

Of loops this short numba's compiler makes no vectors: it cannot know that what is written is not what is read next.
`width` has to be known when the caller is compiled. Nothing is checked, as in `models.memory`. Products and sums are
rounded one by one, as numpy's are.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

_F32, _F64 = ir.FloatType(), ir.DoubleType()


class _Vectors:
    """Builds instructions on vectors of so many numbers."""

    def __init__(self, builder: ir.IRBuilder, width: int) -> None:
        self._builder, self._width = builder, width

    def at(self, address: ir.Value, number: ir.Type) -> Any:
        return self._builder.inttoptr(address, ir.VectorType(number, self._width).as_pointer())

    def load(self, address: ir.Value, number: ir.Type) -> Any:
        return self._builder.load(self.at(address, number), align=1)

    def store(self, value: ir.Value, address: ir.Value, number: ir.Type) -> None:
        self._builder.store(value, self.at(address, number), align=1)

    def wide(self, value: ir.Value) -> Any:
        return self._builder.fpext(value, ir.VectorType(_F64, self._width))

    def narrow(self, value: ir.Value) -> Any:
        return self._builder.fptrunc(value, ir.VectorType(_F32, self._width))

    def repeated(self, number: ir.Value) -> Any:
        none = ir.Constant(ir.VectorType(_F64, self._width), ir.Undefined)
        first = self._builder.insert_element(none, number, ir.IntType(32)(0))
        return self._builder.shuffle_vector(first, none, ir.Constant(ir.VectorType(ir.IntType(32), self._width), None))


def _known(width: Any) -> int:
    """The width, which numba asks for again as a literal where it is none."""
    if not isinstance(width, types.IntegerLiteral):
        raise RequireLiteralValue("width")
    return width.literal_value


def _add_product():
    def typed(typing_context, to, factor, first, second, width):
        lanes = _known(width)

        def generate(context, builder, signature, arguments):
            to, factor, first, second, _ = arguments
            on = _Vectors(builder, lanes)
            number = on.wide(builder.fadd(on.load(first, _F32), on.load(second, _F32)))
            sum_ = builder.fadd(on.load(to, _F64), builder.fmul(on.repeated(factor), number))
            on.store(sum_, to, _F64)
            return context.get_dummy_value()

        return types.void(types.int64, types.float64, types.int64, types.int64, width), generate

    return intrinsic(prefer_literal=True)(unwrap(typed))


def _by_number(build: Callable[..., tuple[ir.Value, ir.Type]]):
    """(to, number, source, width): at `to` what `build` makes of the number in all lanes and of the source."""

    def typed(typing_context, to, number, source, width):
        lanes = _known(width)

        def generate(context, builder, signature, arguments):
            to, number, source, _ = arguments
            on = _Vectors(builder, lanes)
            made, kind = build(builder, on, on.repeated(number), source)
            on.store(made, to, kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.float64, types.int64, width), generate

    return intrinsic(prefer_literal=True)(unwrap(typed))


# add_product(to, factor, first, second, width): float64 at `to` += factor * (first + second), which are float32
add_product = _add_product()
# product(to, factor, source, width): float64 at `to` = factor * source, which is float32
product = _by_number(lambda builder, on, factor, at: (builder.fmul(factor, on.wide(on.load(at, _F32))), _F64))
# quotient(to, divisor, source, width): float32 at `to` = source, which is float64, / divisor
quotient = _by_number(lambda builder, on, divisor, at: (on.narrow(builder.fdiv(on.load(at, _F64), divisor)), _F32))
