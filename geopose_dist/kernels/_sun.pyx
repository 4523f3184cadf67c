"""Cast shadows of a height map: per cell, how high a point must be to see the sun; door and twin are in render.py.

Cells are strung on lines towards the sun, one cell wide. Along such a line the shadow falls by the same amount from
cell to cell and begins anew at whatever stands above it, so that one pass over the map finds all shadows.
"""

cimport geopose_dist.kernels._clones
from libc.math cimport floor

cdef extern from *:
    """
    /* One row after the row nearer to the sun. Pairs of floats: under the low and the high end of the sun's disc. */
    GP_CLONES
    static void gp_shadow_row(const float *before, const float *height, float *out, Py_ssize_t count,
                              float low, float high) {
        for (Py_ssize_t i = 0; i < count; i++) {
            float h = height[i], a = before[2 * i], b = before[2 * i + 1];
            out[2 * i] = (a > h ? a : h) - low;
            out[2 * i + 1] = (b > h ? b : h) - high;
        }
    }
    """
    void gp_shadow_row(const float*, const float*, float*, Py_ssize_t, float, float) noexcept nogil

cdef float LIT = -1e6


cdef inline Py_ssize_t offset(Py_ssize_t at, double along) noexcept nogil:
    """Cells by which a line has moved sideways at a row (or column)."""
    return <Py_ssize_t>floor(at * along + 0.5)


cdef void down(const float* height, float* out, Py_ssize_t rows, Py_ssize_t cols, int step, double along,
               float low, float high) noexcept nogil:
    """Row after row, away from a sun that stands more over rows than over columns; it is at row + step."""
    cdef Py_ssize_t row, col, k, move, first, last, before
    for k in range(rows):
        row = rows - 1 - k if step > 0 else k
        if k == 0:
            for col in range(2 * cols):
                out[2 * row * cols + col] = LIT
            continue
        before = row + step
        move = offset(before, along) - offset(row, along)
        first = -move if move < 0 else 0
        last = cols - move if move > 0 else cols
        if first:
            out[2 * row * cols] = LIT
            out[2 * row * cols + 1] = LIT
        if last < cols:
            out[2 * (row * cols + cols - 1)] = LIT
            out[2 * (row * cols + cols - 1) + 1] = LIT
        gp_shadow_row(out + 2 * (before * cols + first + move), height + before * cols + first + move,
                      out + 2 * (row * cols + first), last - first, low, high)


def shadows(const float[:, ::1] height, double along, int step, float low, float high, float[:, :, ::1] out):
    """Fill out[row, col] with the heights above which all and none of the sun's disc shows.

    The sun is at row + step, `along` columns to a row; low and high are metres of fall from row to row under the
    disc's ends. Where the sun stands more over columns, the caller turns the map.
    """
    with nogil:
        down(&height[0, 0], &out[0, 0, 0], height.shape[0], height.shape[1], step, along, low, high)
