# cython: language_level=3
"""Where surfaces come to lie when each moves against the flow, by following lines of sight.

A surface pixel at u (its coordinate along the flow direction) that rises by `shift` pixels appears at
u - shift. What is seen at u0 is therefore the surface at the LARGEST u with u - shift(u) = u0: the line of
sight comes from above, and above means farther along the direction. Every output pixel looks along its own
line, one pixel per step, and takes the last step k whose shift reaches k; the crossing lies between k and
k + 1 and is found by a straight line between the two (facades stretch, roofs keep their size, what is
hidden is hidden). No pixel can remain a hole but where the line leaves the tile.
Cost: tiles of 16 x 64 pixels skip the stretches of their lines on which nothing is tall enough.
"""

from libc.math cimport NAN, isfinite
from libc.stdlib cimport free, malloc

from geopose_dist.kernels._path cimport nearest, step_length

cdef extern from *:
    """
    /* Runtime dispatch without -march=native: the loader picks the widest clone that the machine has. The
       clones do the same IEEE operations in the same order, so results do not depend on the machine. */
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) \
        && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    #define GP_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define GP_CLONES
    #endif

    /* last[i] = k where the surface k steps along is at least t pixels tall; k only grows, so max will do. */
    GP_CLONES static void gp_march(const float *src, float *last, Py_ssize_t n, float t, float k) {
        for (Py_ssize_t i = 0; i < n; i++) {
            float mine = src[i] >= t ? k : 0.0f;
            last[i] = last[i] > mine ? last[i] : mine;
        }
    }

    /* The crossing where the last step is 0: between the pixel itself (here) and its first step (next). */
    GP_CLONES static void gp_cross0(const float *here, const float *next, float *out, Py_ssize_t n, float length) {
        for (Py_ssize_t i = 0; i < n; i++) {
            float lo = here[i], hi = next[i];
            float a = lo / (lo + (length - hi));
            out[i] = lo + a * (hi - lo);
        }
    }

    /* Shift in pixels of heights in metres: below 0 counts as 0; the number of unknown ones is returned. */
    GP_CLONES static Py_ssize_t gp_shift(const float *agl, float *out, Py_ssize_t n, float c, float *tallest) {
        int unknown = 0;
        float most = *tallest;
        for (Py_ssize_t i = 0; i < n; i++) {
            float v = agl[i] * c;
            unknown += !(v < 3e38f && v > -3e38f);
            v = v < 0.0f ? 0.0f : v;
            most = v > most ? v : most;
            out[i] = v;
        }
        *tallest = most;
        return unknown;
    }
    """
    void gp_march(const float *src, float *last, Py_ssize_t n, float t, float k) noexcept nogil
    void gp_cross0(const float *here, const float *next, float *out, Py_ssize_t n, float length) noexcept nogil
    Py_ssize_t gp_shift(const float *agl, float *out, Py_ssize_t n, float c, float *tallest) noexcept nogil

cdef enum:
    TILE_ROWS = 16
    TILE_COLS = 64
    BLOCK = 16
    CHUNK = 8


def shifts(const float[:, ::1] agl_m, float[:, ::1] out, double px_per_m):
    """out = max(agl_m * px_per_m, 0), NaN kept; returns (number not finite, largest)."""
    cdef Py_ssize_t rows = agl_m.shape[0], cols = agl_m.shape[1], y, unknown = 0
    cdef float tallest = 0.0
    with nogil:
        for y in range(rows):
            unknown += gp_shift(&agl_m[y, 0], &out[y, 0], cols, <float>px_per_m, &tallest)
    return unknown, float(tallest)


def fill_unknown(const float[:, ::1] agl_m, float[:, ::1] shift, float[:, :, ::1] before,
                 double dir_y, double dir_x, double drop):
    """Give `shift` a value to stand on where `agl_m` is not finite, in place.

    Along the line of sight, an unknown stretch between a known L before it and a known R behind it becomes
    max(min(L, R), L - drop * steps): a facade comes down from a roof by `drop` pixels of shift per step
    and reaches the ground behind it, and before a roof's far edge there is ground. At the tile's edge the one
    known neighbour counts; a line without any counts as ground (0). `before` [2, rows, cols] is scratch.
    """
    cdef Py_ssize_t rows = shift.shape[0], cols = shift.shape[1]
    cdef bint down = (dir_y if dir_y >= 0 else -dir_y) >= (dir_x if dir_x >= 0 else -dir_x)
    cdef double slope = dir_x / dir_y if down else dir_y / dir_x
    cdef int sy = 1 if dir_y >= 0 else -1, sx = 1 if dir_x >= 0 else -1
    cdef Py_ssize_t i, j, y, x, py, px
    cdef float known, ramp, behind, dropf = <float>drop
    with nogil:
        # With the line: what is known before. Raster order that runs the way the line does on both axes.
        for i in range(rows):
            y = i if sy > 0 else rows - 1 - i
            for j in range(cols):
                x = j if sx > 0 else cols - 1 - j
                known = shift[y, x]
                ramp = known
                if not isfinite(agl_m[y, x]):
                    known = ramp = NAN
                    if down:
                        py = y - sy
                        px = x + nearest(slope * py) - nearest(slope * y)
                    else:
                        px = x - sx
                        py = y + nearest(slope * px) - nearest(slope * x)
                    if 0 <= py < rows and 0 <= px < cols:
                        known = before[0, py, px]
                        ramp = before[1, py, px] - dropf
                before[0, y, x] = known
                before[1, y, x] = ramp
        # Against the line: what is known behind, left in `shift` itself.
        for i in range(rows):
            y = rows - 1 - i if sy > 0 else i
            for j in range(cols):
                x = cols - 1 - j if sx > 0 else j
                if isfinite(agl_m[y, x]):
                    continue
                shift[y, x] = NAN
                if down:
                    py = y + sy
                    px = x + nearest(slope * py) - nearest(slope * y)
                else:
                    px = x + sx
                    py = y + nearest(slope * px) - nearest(slope * x)
                if 0 <= py < rows and 0 <= px < cols:
                    shift[y, x] = shift[py, px]
        for y in range(rows):
            for x in range(cols):
                if isfinite(agl_m[y, x]):
                    continue
                known = before[0, y, x]
                ramp = before[1, y, x]
                behind = shift[y, x]
                if not isfinite(known):
                    shift[y, x] = behind if isfinite(behind) else 0.0
                elif not isfinite(behind):
                    shift[y, x] = known
                else:
                    behind = behind if behind < known else known
                    shift[y, x] = ramp if ramp > behind else behind


def block_tallest(const float[:, ::1] shift, float[:, ::1] out):
    """Largest value of each BLOCK x BLOCK block."""
    cdef Py_ssize_t rows = shift.shape[0], cols = shift.shape[1], y, x
    with nogil:
        out[:, :] = 0.0
        for y in range(rows):
            for x in range(cols):
                if shift[y, x] > out[y // BLOCK, x // BLOCK]:
                    out[y // BLOCK, x // BLOCK] = shift[y, x]


cdef inline float covering(const float[:, ::1] blocks, Py_ssize_t top, Py_ssize_t bottom,
                           Py_ssize_t left, Py_ssize_t right) noexcept nogil:
    """Upper bound of the shift over rows top..bottom and columns left..right (inclusive, clipped)."""
    cdef Py_ssize_t by, bx
    cdef float most = 0.0
    top = (top if top > 0 else 0) // BLOCK
    left = (left if left > 0 else 0) // BLOCK
    if bottom < 0 or right < 0:
        return most
    bottom = bottom // BLOCK
    right = right // BLOCK
    if bottom > blocks.shape[0] - 1:
        bottom = blocks.shape[0] - 1
    if right > blocks.shape[1] - 1:
        right = blocks.shape[1] - 1
    for by in range(top, bottom + 1):
        for bx in range(left, right + 1):
            if blocks[by, bx] > most:
                most = blocks[by, bx]
    return most


def follow(const float[:, ::1] shift, const float[:, ::1] blocks, float[:, ::1] out,
           double dir_y, double dir_x, double tallest):
    """out = shift of the surface seen at each pixel after the move; NaN where the line leaves the tile.

    `shift` is finite and >= 0, `blocks` its `block_tallest`, `tallest` its maximum.
    """
    cdef Py_ssize_t rows = shift.shape[0], cols = shift.shape[1]
    cdef double length = step_length(dir_y, dir_x)
    cdef Py_ssize_t reach = <Py_ssize_t>(tallest / length) + 2
    cdef Py_ssize_t *oy = <Py_ssize_t *>malloc((reach + CHUNK + 2) * sizeof(Py_ssize_t))
    cdef Py_ssize_t *ox = <Py_ssize_t *>malloc((reach + CHUNK + 2) * sizeof(Py_ssize_t))
    if oy == NULL or ox == NULL:
        free(oy)
        free(ox)
        raise MemoryError
    cdef float last[TILE_ROWS * TILE_COLS]
    cdef Py_ssize_t ti, tj, ty, tx, chunk, y, x, y1, x1, k, k0, k1, i, lo_x, hi_x, sy, sx, n
    cdef bint marched
    cdef float lo, hi, q0, q1, len_f = <float>length
    cdef float *row
    with nogil:
        for k in range(reach + CHUNK + 2):
            oy[k] = nearest(k * length * dir_y)
            ox[k] = nearest(k * length * dir_x)
        for ti in range((rows + TILE_ROWS - 1) // TILE_ROWS):
            ty = ti * TILE_ROWS
            y1 = ty + TILE_ROWS if ty + TILE_ROWS < rows else rows
            for tj in range((cols + TILE_COLS - 1) // TILE_COLS):
                tx = tj * TILE_COLS
                x1 = tx + TILE_COLS if tx + TILE_COLS < cols else cols
                marched = False
                for chunk in range((reach + CHUNK - 1) // CHUNK):
                    k0 = 1 + chunk * CHUNK
                    k1 = k0 + CHUNK - 1
                    if covering(blocks, ty + (oy[k0] if oy[k0] < oy[k1] else oy[k1]),
                                y1 - 1 + (oy[k0] if oy[k0] > oy[k1] else oy[k1]),
                                tx + (ox[k0] if ox[k0] < ox[k1] else ox[k1]),
                                x1 - 1 + (ox[k0] if ox[k0] > ox[k1] else ox[k1])) < <float>(k0 * length):
                        continue
                    if not marched:
                        marched = True
                        for i in range(TILE_ROWS * TILE_COLS):
                            last[i] = 0.0
                    for y in range(ty, y1):
                        row = &last[(y - ty) * TILE_COLS]
                        for k in range(k0, k1 + 1):
                            sy = y + oy[k]
                            lo_x = tx if tx + ox[k] >= 0 else -ox[k]
                            hi_x = x1 if x1 + ox[k] <= cols else cols - ox[k]
                            if sy < 0 or sy >= rows or lo_x >= hi_x:
                                continue
                            gp_march(&shift[sy, lo_x + ox[k]], row + (lo_x - tx), hi_x - lo_x,
                                     <float>(k * length), <float>k)
                for y in range(ty, y1):
                    sy = y + oy[1]
                    if not marched and 0 <= sy < rows and tx + ox[1] >= 0 and x1 + ox[1] <= cols:
                        gp_cross0(&shift[y, tx], &shift[sy, tx + ox[1]], &out[y, tx], x1 - tx, len_f)
                        continue
                    for x in range(tx, x1):
                        k = <Py_ssize_t>last[(y - ty) * TILE_COLS + x - tx] if marched else 0
                        lo = shift[y + oy[k], x + ox[k]]
                        sy = y + oy[k + 1]
                        sx = x + ox[k + 1]
                        q0 = lo - <float>(k * length)
                        if 0 <= sy < rows and 0 <= sx < cols:
                            hi = shift[sy, sx]
                            q1 = <float>((k + 1) * length) - hi
                            out[y, x] = lo + q0 / (q0 + q1) * (hi - lo)
                        else:
                            # The next step is off the tile; half a pixel beyond the last sample still is its own.
                            out[y, x] = lo if q0 <= 0.5 * len_f else NAN
    free(oy)
    free(ox)
