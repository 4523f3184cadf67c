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

cimport geopose_dist.kernels._clones
from geopose_dist.kernels._path cimport nearest, step_length

cdef extern from *:
    """
    #include <string.h>

    /* last[i] = k where the surface k steps along is at least t pixels tall; k only grows, so max will do. */
    GP_CLONES static void gp_march(const float *restrict src, int *restrict last, Py_ssize_t n, float t, int k) {
        for (Py_ssize_t i = 0; i < n; i++) {
            int m = -(int)(src[i] >= t) & k;
            last[i] = last[i] > m ? last[i] : m;
        }
    }

    /* Four steps at once, k .. k + 3, so that last[] is read and written once. Masks, not conditions: the
       compiler would make branches of those. */
    GP_CLONES static void gp_march4(const float *restrict from, const int *restrict off, const float *restrict t, int k,
                                    int *restrict last, Py_ssize_t n) {
        const float *s0 = from + off[0], *s1 = from + off[1], *s2 = from + off[2], *s3 = from + off[3];
        const float t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
        for (Py_ssize_t i = 0; i < n; i++) {
            int mine = last[i], m;
            m = -(int)(s0[i] >= t0) & (k + 0); mine = mine > m ? mine : m;
            m = -(int)(s1[i] >= t1) & (k + 1); mine = mine > m ? mine : m;
            m = -(int)(s2[i] >= t2) & (k + 2); mine = mine > m ? mine : m;
            m = -(int)(s3[i] >= t3) & (k + 3); mine = mine > m ? mine : m;
            last[i] = mine;
        }
    }

    /* The crossing between the last step that is tall enough and the next one. Fetching is left to single loads
       and arithmetic to vectors: AVX2's gather instruction is slower than both. n is at most 64. */
    __attribute__((optimize("no-tree-vectorize")))
    static void gp_fetch(const float *restrict from, const int *restrict off, const int *restrict last,
                         float *restrict lo, float *restrict hi, Py_ssize_t n) {
        Py_ssize_t i = 0;
        for (; i + 4 <= n; i += 4) {
            const int *o = off + last[i];
            if (last[i] == last[i + 1] && last[i] == last[i + 2] && last[i] == last[i + 3]) {
                memcpy(lo + i, from + i + o[0], 16);
                memcpy(hi + i, from + i + o[1], 16);
                continue;
            }
            for (Py_ssize_t j = i; j < i + 4; j++) {
                lo[j] = from[j + off[last[j]]];
                hi[j] = from[j + off[last[j] + 1]];
            }
        }
        for (; i < n; i++) {
            lo[i] = from[i + off[last[i]]];
            hi[i] = from[i + off[last[i] + 1]];
        }
    }

    GP_CLONES static void gp_solve(const float *restrict lo, const float *restrict hi, const int *restrict last,
                                   float length, float *restrict out, Py_ssize_t n) {
        for (Py_ssize_t i = 0; i < n; i++) {
            float q0 = lo[i] - (float)last[i] * length, q1 = (float)(last[i] + 1) * length - hi[i];
            out[i] = lo[i] + q0 / (q0 + q1) * (hi[i] - lo[i]);
        }
    }

    /* The crossing where the last step is 0 everywhere: between the pixel itself and its first step. */
    GP_CLONES static void gp_cross0(const float *restrict here, const float *restrict next, float *restrict out,
                                    Py_ssize_t n, float length) {
        for (Py_ssize_t i = 0; i < n; i++) {
            float lo = here[i], hi = next[i];
            out[i] = lo + lo / (lo + (length - hi)) * (hi - lo);
        }
    }

    GP_CLONES static int gp_any(const int *restrict last, Py_ssize_t n) {
        int any = 0;
        for (Py_ssize_t i = 0; i < n; i++)
            any |= last[i];
        return any;
    }

    static void gp_cross(const float *from, const int *off, const int *last, float length, float *out, Py_ssize_t n) {
        float lo[64], hi[64];
        if (!gp_any(last, n)) {
            gp_cross0(from, from + off[1], out, n, length);
            return;
        }
        gp_fetch(from, off, last, lo, hi, n);
        gp_solve(lo, hi, last, length, out, n);
    }

    /* Shift in pixels of heights in metres: below 0 counts as 0; also the largest per column so far. Returns
       how many are unknown. */
    GP_CLONES static Py_ssize_t gp_shift(const float *restrict agl, float *restrict out, float *restrict column,
                                         Py_ssize_t n, float c) {
        int unknown = 0;
        for (Py_ssize_t i = 0; i < n; i++) {
            float v = agl[i] * c;
            unknown += 1 - ((v < 3e38f) & (v > -3e38f));
            v = v < 0.0f ? 0.0f : v;
            column[i] = v > column[i] ? v : column[i];
            out[i] = v;
        }
        return unknown;
    }

    GP_CLONES static void gp_larger(const float *restrict src, float *restrict column, Py_ssize_t n) {
        for (Py_ssize_t i = 0; i < n; i++)
            column[i] = src[i] > column[i] ? src[i] : column[i];
    }
    """
    void gp_march(const float *src, int *last, Py_ssize_t n, float t, int k) noexcept nogil
    void gp_march4(const float *src, const int *off, const float *t, int k, int *last, Py_ssize_t n) noexcept nogil
    void gp_cross(const float *src, const int *off, const int *last, float length, float *out,
                  Py_ssize_t n) noexcept nogil
    void gp_cross0(const float *here, const float *next, float *out, Py_ssize_t n, float length) noexcept nogil
    Py_ssize_t gp_shift(const float *agl, float *out, float *column, Py_ssize_t n, float c) noexcept nogil
    void gp_larger(const float *src, float *column, Py_ssize_t n) noexcept nogil

cdef enum:
    TILE_ROWS = 16
    TILE_COLS = 64
    BLOCK = 16
    CHUNK = 4


cdef void reduce_columns(float[:, ::1] blocks, Py_ssize_t block_row, float *column, Py_ssize_t cols) noexcept nogil:
    """The largest of each BLOCK columns into one row of `blocks`; `column` starts again at 0."""
    cdef Py_ssize_t x
    for x in range(blocks.shape[1]):
        blocks[block_row, x] = 0.0
    for x in range(cols):
        if column[x] > blocks[block_row, x // BLOCK]:
            blocks[block_row, x // BLOCK] = column[x]
        column[x] = 0.0


def shifts(const float[:, ::1] agl_m, float[:, ::1] out, float[:, ::1] blocks, float[::1] column, double px_per_m):
    """out = max(agl_m * px_per_m, 0), NaN kept; blocks = largest of each BLOCK x BLOCK; returns the number not finite.

    `column` [cols] is scratch and must be 0.
    """
    cdef Py_ssize_t rows = agl_m.shape[0], cols = agl_m.shape[1], y, unknown = 0
    with nogil:
        for y in range(rows):
            unknown += gp_shift(&agl_m[y, 0], &out[y, 0], &column[0], cols, <float>px_per_m)
            if y % BLOCK == BLOCK - 1 or y == rows - 1:
                reduce_columns(blocks, y // BLOCK, &column[0], cols)
    return unknown


def block_tallest(const float[:, ::1] shift, float[:, ::1] blocks, float[::1] column):
    """blocks = largest shift of each BLOCK x BLOCK; `column` [cols] is scratch and must be 0."""
    cdef Py_ssize_t rows = shift.shape[0], cols = shift.shape[1], y
    with nogil:
        for y in range(rows):
            gp_larger(&shift[y, 0], &column[0], cols)
            if y % BLOCK == BLOCK - 1 or y == rows - 1:
                reduce_columns(blocks, y // BLOCK, &column[0], cols)


def fill_unknown(const float[:, ::1] agl_m, float[:, ::1] shift, float[:, :, ::1] before,
                 double dir_y, double dir_x, double drop, Py_ssize_t row, Py_ssize_t col):
    """Give `shift` a value to stand on where `agl_m` is not finite, in place.

    Along the line of sight, an unknown stretch between a known L before it and a known R behind it becomes
    max(min(L, R), L - drop * steps): a facade comes down from a roof by `drop` pixels of shift per step
    and reaches the ground behind it, and before a roof's far edge there is ground. At the tile's edge the one
    known neighbour counts; a line without any counts as ground (0). `before` [2, rows, cols] is scratch. Lines
    are those of the tile, of which `row` and `col` come first here.
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
                        px = x + nearest(slope * (py + row)) - nearest(slope * (y + row))
                    else:
                        px = x - sx
                        py = y + nearest(slope * (px + col)) - nearest(slope * (x + col))
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
                    px = x + nearest(slope * (py + row)) - nearest(slope * (y + row))
                else:
                    px = x + sx
                    py = y + nearest(slope * (px + col)) - nearest(slope * (x + col))
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

    `shift` is finite and >= 0, `blocks` its `block_tallest`, `tallest` its maximum, or what leaves the tile.
    """
    cdef Py_ssize_t cols = shift.shape[1], k
    cdef double length = step_length(dir_y, dir_x)
    cdef Py_ssize_t reach = <Py_ssize_t>(tallest / length) + 2, steps = reach + CHUNK + 2
    # Of each step: rows and columns away, elements away, pixels along the line.
    cdef int *oy = <int *>malloc(steps * sizeof(int))
    cdef int *ox = <int *>malloc(steps * sizeof(int))
    cdef int *off = <int *>malloc(steps * sizeof(int))
    cdef float *t = <float *>malloc(steps * sizeof(float))
    if oy == NULL or ox == NULL or off == NULL or t == NULL:
        free(oy)
        free(ox)
        free(off)
        free(t)
        raise MemoryError
    with nogil:
        for k in range(steps):
            oy[k] = <int>nearest(k * length * dir_y)
            ox[k] = <int>nearest(k * length * dir_x)
            off[k] = <int>(oy[k] * cols + ox[k])
            t[k] = <float>k * <float>length
        follow_tiles(shift, blocks, out, oy, ox, off, t, reach)
    free(oy)
    free(ox)
    free(off)
    free(t)


cdef void follow_tiles(const float[:, ::1] shift, const float[:, ::1] blocks, float[:, ::1] out,
                       const int *oy, const int *ox, const int *off, const float *t, Py_ssize_t reach) noexcept nogil:
    cdef Py_ssize_t rows = shift.shape[0], cols = shift.shape[1]
    cdef Py_ssize_t ti, tj, ty, tx, y1, x1, chunk, k0, k1, farthest, i, y
    cdef int last[TILE_ROWS * TILE_COLS]
    cdef int *row
    cdef bint within
    for ti in range((rows + TILE_ROWS - 1) // TILE_ROWS):
        ty = ti * TILE_ROWS
        y1 = ty + TILE_ROWS if ty + TILE_ROWS < rows else rows
        for tj in range((cols + TILE_COLS - 1) // TILE_COLS):
            tx = tj * TILE_COLS
            x1 = tx + TILE_COLS if tx + TILE_COLS < cols else cols
            farthest = 0
            for chunk in range((reach + CHUNK - 1) // CHUNK):
                k0 = 1 + chunk * CHUNK
                k1 = k0 + CHUNK - 1
                if covering(blocks, ty + (oy[k0] if oy[k0] < oy[k1] else oy[k1]),
                            y1 - 1 + (oy[k0] if oy[k0] > oy[k1] else oy[k1]),
                            tx + (ox[k0] if ox[k0] < ox[k1] else ox[k1]),
                            x1 - 1 + (ox[k0] if ox[k0] > ox[k1] else ox[k1])) < t[k0]:
                    continue
                if farthest == 0:
                    for i in range(TILE_ROWS * TILE_COLS):
                        last[i] = 0
                farthest = k1
                within = (0 <= ty + oy[k1] and y1 + oy[k1] <= rows and 0 <= tx + ox[k1] and x1 + ox[k1] <= cols)
                for y in range(ty, y1):
                    row = &last[(y - ty) * TILE_COLS]
                    if within:
                        gp_march4(&shift[y, tx], off + k0, t + k0, <int>k0, row, x1 - tx)
                    else:
                        march_clipped(shift, oy, ox, t, k0, k1, y, tx, x1, row)
            # The next step after the farthest that may have been the last one.
            k1 = farthest + 1
            within = (0 <= ty + oy[k1] and y1 + oy[k1] <= rows and 0 <= tx + ox[k1] and x1 + ox[k1] <= cols)
            for y in range(ty, y1):
                row = &last[(y - ty) * TILE_COLS]
                if not within:
                    cross_clipped(shift, out, oy, ox, t, row, farthest > 0, y, tx, x1)
                elif farthest > 0:
                    gp_cross(&shift[y, tx], off, row, t[1], &out[y, tx], x1 - tx)
                else:
                    gp_cross0(&shift[y, tx], &shift[y, tx] + off[1], &out[y, tx], x1 - tx, t[1])


cdef void march_clipped(const float[:, ::1] shift, const int *oy, const int *ox, const float *t, Py_ssize_t k0,
                        Py_ssize_t k1, Py_ssize_t y, Py_ssize_t tx, Py_ssize_t x1, int *row) noexcept nogil:
    """gp_march4 where some steps are off the tile."""
    cdef Py_ssize_t k, sy, low, high
    for k in range(k0, k1 + 1):
        sy = y + oy[k]
        low = tx if tx + ox[k] >= 0 else -ox[k]
        high = x1 if x1 + ox[k] <= shift.shape[1] else shift.shape[1] - ox[k]
        if 0 <= sy < shift.shape[0] and low < high:
            gp_march(&shift[sy, low + ox[k]], row + (low - tx), high - low, t[k], <int>k)


cdef void cross_clipped(const float[:, ::1] shift, float[:, ::1] out, const int *oy, const int *ox, const float *t,
                        const int *row, bint marched, Py_ssize_t y, Py_ssize_t tx, Py_ssize_t x1) noexcept nogil:
    """gp_cross where the next step may be off the tile; half a pixel beyond the last sample still is its own."""
    cdef Py_ssize_t x, k, sy, sx
    cdef float lo, hi, q0, q1
    for x in range(tx, x1):
        k = row[x - tx] if marched else 0
        lo = shift[y + oy[k], x + ox[k]]
        q0 = lo - t[k]
        sy = y + oy[k + 1]
        sx = x + ox[k + 1]
        if 0 <= sy < shift.shape[0] and 0 <= sx < shift.shape[1]:
            hi = shift[sy, sx]
            q1 = t[k + 1] - hi
            out[y, x] = lo + q0 / (q0 + q1) * (hi - lo)
        else:
            out[y, x] = lo if q0 <= 0.5 * t[1] else NAN
