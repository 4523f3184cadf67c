# cython: language_level=3
"""Forward splat: every pixel lands where its flow takes it, and the tallest that lands stays.

Used to rectify a tile to the ground. One pass writes, per ground pixel, the index of the source pixel that
won; ties go to the first in raster order, unknown heights lose to everything. Slopes that face away are
stretched and leave cracks one pixel wide: a pixel without a landing between two opposite neighbours that have one
is a crack and takes the lower of the two, anything wider was hidden from the camera.
"""

from libc.math cimport NAN

from libc.stdint cimport int32_t, uint8_t


cdef inline Py_ssize_t _nearest(double x) noexcept nogil:
    """floor(x + 0.5) without the library call that a baseline x86-64 makes of it; |x| is below 2^62."""
    cdef double up = x + 0.5
    cdef Py_ssize_t whole = <Py_ssize_t>up
    return whole - (whole > up)


def splat(const float[:, ::1] agl_m, double px_per_m, double dir_y, double dir_x, int32_t[:, ::1] winner):
    """winner = row-major index of the source pixel that lands tallest, -1 where none does."""
    cdef Py_ssize_t rows = agl_m.shape[0], cols = agl_m.shape[1], y, x, ty, tx
    cdef double fy = px_per_m * dir_y, fx = px_per_m * dir_x
    cdef float h, other
    cdef int32_t old
    cdef int32_t *won = &winner[0, 0]
    cdef const float *heights = &agl_m[0, 0]
    cdef const float *row
    with nogil:
        winner[:, :] = -1
        for y in range(rows):
            row = heights + y * cols
            for x in range(cols):
                h = row[x]
                # Compared as doubles first: a height far off the scale must not overflow the integer.
                if -1e9 < h * px_per_m < 1e9:
                    ty = y + _nearest(h * fy)
                    tx = x + _nearest(h * fx)
                    if ty < 0 or ty >= rows or tx < 0 or tx >= cols:
                        continue
                    old = won[ty * cols + tx]
                    if old >= 0:
                        other = heights[old]
                        if other - other == 0 and not h > other:  # known, and at least as tall
                            continue
                    won[ty * cols + tx] = <int32_t>(y * cols + x)
                elif h - h != 0 and won[y * cols + x] < 0:  # NaN and infinity stay where nothing known landed
                    won[y * cols + x] = <int32_t>(y * cols + x)


def settle(const uint8_t[:, :, ::1] rgb, const float[:, ::1] agl_m, const int32_t[:, ::1] winner,
           uint8_t[:, :, ::1] out_rgb, float[:, ::1] out_agl, uint8_t[:, ::1] occluded):
    """Carry the winners' colours and heights to the ground, close cracks, mark the rest as occluded."""
    cdef Py_ssize_t rows = agl_m.shape[0], cols = agl_m.shape[1], y, x, i, j
    cdef int32_t w
    cdef float h
    cdef const uint8_t *colours = &rgb[0, 0, 0]
    cdef const float *heights = &agl_m[0, 0]
    cdef const int32_t *won = &winner[0, 0]
    cdef uint8_t *to_rgb = &out_rgb[0, 0, 0]
    cdef float *to_agl = &out_agl[0, 0]
    cdef uint8_t *hidden = &occluded[0, 0]
    with nogil:
        for y in range(rows):
            for x in range(cols):
                i = y * cols + x
                w = won[i]
                if w < 0 and 0 < y < rows - 1 and 0 < x < cols - 1:
                    w = _crack(heights, won + i, cols)
                if w < 0:
                    to_agl[i] = NAN
                    hidden[i] = 1
                    to_rgb[3 * i] = to_rgb[3 * i + 1] = to_rgb[3 * i + 2] = 0
                else:
                    j = w  # three times it may leave 31 bits
                    h = heights[j]
                    to_agl[i] = h if h - h == 0 else <float>NAN
                    hidden[i] = 0
                    to_rgb[3 * i] = colours[3 * j]
                    to_rgb[3 * i + 1] = colours[3 * j + 1]
                    to_rgb[3 * i + 2] = colours[3 * j + 2]


cdef inline int32_t _crack(const float *heights, const int32_t *at, Py_ssize_t cols) noexcept nogil:
    """The lower of two opposite neighbours that both have a landing, -1 if no pair has."""
    cdef Py_ssize_t q, step
    cdef Py_ssize_t *steps = [1, cols, cols + 1, cols - 1]
    cdef int32_t a, b
    cdef float ha, hb
    for q in range(4):
        step = steps[q]
        a = at[-step]
        b = at[step]
        if a < 0 or b < 0:
            continue
        ha = heights[a]
        hb = heights[b]
        return b if ha - ha == 0 and hb - hb == 0 and hb < ha else a
    return -1
