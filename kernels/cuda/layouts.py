"""Which thread holds what, as Gluon layouts.

A layout names, for every bit of a register's, a lane's and a warp's number, the step in the tensor
that it stands for. WN, WK and WM are the warps along rows of W, along K and along tokens.
"""

# No `from __future__ import annotations`: Gluon evaluates what these functions return.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def powers(size):
    """1, 2, 4, ... below a power of two."""
    return [1 << bit for bit in range(size.bit_length() - 1)]


@gluon.constexpr_function
def contiguous(shape, warps, vector=4):
    """Each lane `vector` neighbours of the last axis, lanes and then warps behind each other."""
    rank, bits = len(shape), []
    for axis in reversed(range(rank)):
        for step in powers(shape[axis]):
            basis = [0] * rank
            basis[axis] = step
            bits.append(basis)
    n = len(powers(vector))
    w = len(powers(warps))
    registers, lanes, of_warps, rest = (
        bits[:n],
        bits[n : n + 5],
        bits[n + 5 : n + 5 + w],
        bits[n + 5 + w :],
    )
    nothing = [0] * rank
    lanes = lanes + [nothing] * (5 - len(lanes))
    of_warps = of_warps + [nothing] * (w - len(of_warps))
    return gl.DistributedLinearLayout(registers + rest, lanes, of_warps, [], list(shape))


@gluon.constexpr_function
def fragments(WN, WK, WM):
    """[WK, tile of rows, tile of tokens, lane, 4]: what an instruction of a lane takes at once."""
    return gl.BlockedLayout([1, 4, 1, 1, 4], [1, 1, 1, 32, 1], [WK, WN, WM, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def weight_blocks(blocks, pieces, WN, WK, WM):
    """[block of rows, WK, piece, lane, 4] in shared memory: block n belongs to warp n % WN."""
    registers = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 2]]
    registers = registers + [[0, 0, piece, 0, 0] for piece in powers(pieces)]
    registers = registers + [[WN * n, 0, 0, 0, 0] for n in powers(blocks // WN)]
    lanes = [[0, 0, 0, 1 << bit, 0] for bit in range(5)]
    warps = [[0] * 5 for _ in powers(WM)] + [[n, 0, 0, 0, 0] for n in powers(WN)]
    warps = warps + [[0, k, 0, 0, 0] for k in powers(WK)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [blocks, WK, pieces, 32, 4])


@gluon.constexpr_function
def token_matrices(BM, WN, WK, WM):
    """Tokens int32 [BM, 32 WK] as ldmatrix gives them: 8 tokens x 64 columns in eight registers."""
    registers = [[0, 4], [0, 8], [0, 16]] + [[8 * WM * j, 0] for j in powers(BM // 8 // WM)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[8 * j, 0] for j in powers(WM)] + [[0, 0] for _ in powers(WN)]
    warps = warps + [[0, 32 * k] for k in powers(WK)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BM, 32 * WK])
