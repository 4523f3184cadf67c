# cython: language_level=3
"""Forward splat: every pixel lands where its flow takes it, and the tallest that lands stays.

Used to rectify a tile to the ground. One pass writes, per ground pixel, the index of the source pixel that
won; ties go to the first in raster order, unknown heights lose to everything. Slopes that face away are
stretched and leave cracks one pixel wide: a pixel without a landing between two opposite neighbours that have one
is a crack and takes the lower of the two, anything wider was hidden from the camera.
"""

from libc.math cimport NAN, floor, isfinite

from libc.stdint cimport int32_t, uint8_t


def splat(const float[:, ::1] agl_m, double px_per_m, double dir_y, double dir_x, int32_t[:, ::1] winner):
    """winner = row-major index of the source pixel that lands tallest, -1 where none does."""
    cdef Py_ssize_t rows = agl_m.shape[0], cols = agl_m.shape[1], y, x, ty, tx
    cdef double fy = px_per_m * dir_y, fx = px_per_m * dir_x
    cdef float h, other
    cdef int32_t old
    with nogil:
        winner[:, :] = -1
        for y in range(rows):
            for x in range(cols):
                h = agl_m[y, x]
                if isfinite(h):
                    # Compared as doubles first: a height far off the scale must not overflow the integer.
                    if not (-1e9 < h * px_per_m < 1e9):
                        continue
                    ty = y + <Py_ssize_t>floor(h * fy + 0.5)
                    tx = x + <Py_ssize_t>floor(h * fx + 0.5)
                    if ty < 0 or ty >= rows or tx < 0 or tx >= cols:
                        continue
                else:
                    ty = y
                    tx = x
                old = winner[ty, tx]
                if old < 0:
                    winner[ty, tx] = <int32_t>(y * cols + x)
                    continue
                other = agl_m[old // cols, old % cols]
                if isfinite(h) and (not isfinite(other) or h > other):
                    winner[ty, tx] = <int32_t>(y * cols + x)


def settle(const uint8_t[:, :, ::1] rgb, const float[:, ::1] agl_m, const int32_t[:, ::1] winner,
           uint8_t[:, :, ::1] out_rgb, float[:, ::1] out_agl, uint8_t[:, ::1] occluded):
    """Carry the winners' colours and heights to the ground, close cracks, mark the rest as occluded."""
    cdef Py_ssize_t rows = agl_m.shape[0], cols = agl_m.shape[1], y, x, c, q
    cdef int32_t w, a, b
    cdef float ha, hb
    cdef Py_ssize_t *dy = [0, 1, 1, 1]
    cdef Py_ssize_t *dx = [1, 0, 1, -1]
    with nogil:
        for y in range(rows):
            for x in range(cols):
                w = winner[y, x]
                if w < 0 and 0 < y < rows - 1 and 0 < x < cols - 1:
                    for q in range(4):
                        a = winner[y - dy[q], x - dx[q]]
                        b = winner[y + dy[q], x + dx[q]]
                        if a < 0 or b < 0:
                            continue
                        ha = agl_m[a // cols, a % cols]
                        hb = agl_m[b // cols, b % cols]
                        w = b if isfinite(ha) and isfinite(hb) and hb < ha else a
                        break
                if w < 0:
                    out_agl[y, x] = NAN
                    occluded[y, x] = 1
                    for c in range(3):
                        out_rgb[y, x, c] = 0
                else:
                    ha = agl_m[w // cols, w % cols]
                    out_agl[y, x] = ha if isfinite(ha) else NAN
                    occluded[y, x] = 0
                    for c in range(3):
                        out_rgb[y, x, c] = rgb[w // cols, w % cols, c]
