# cython: language_level=3
"""One-pass gather: each output pixel fetches its colour and height through the composed map.

The map is an affine (output row and column to a place in the raised tile), followed, where heights are
raised, by the shift of the surface seen there along the flow direction. So a sample is resampled once, however
many operations it goes through. Colours are bilinear with weights of 1/128, heights nearest: averaging
over a roof's edge would invent surfaces. Outside the tile: fill colour, NaN, inside = 0.
"""

from libc.math cimport fabs

from libc.stdint cimport int32_t, uint8_t

cimport geopose_dist.kernels._clones
from geopose_dist.kernels._colours cimport gp_colours, gp_line

cdef extern from *:
    """
    /* Places of one output row, moved by shift along (dir_y, dir_x): at[i] = element of the upper left of
       the four neighbours or -1 outside, their weights, two 16-bit numbers each that sum to 128, and near[i] =
       the nearest of the four (of equals the later) or -1. Half a pixel around the outermost centres still is
       image. NaN compares as outside. Places count from the tile's corner whatever part of it is here, so that
       a part gives the bytes of the whole; what it lacks reads as its nearest pixel, never outside its memory. */
    GP_CLONES static void gp_places(const gp_line *line, const float *restrict shift, double dir_y, double dir_x,
                                    int n, int32_t *restrict at, int32_t *restrict wx, int32_t *restrict wy,
                                    int32_t *restrict near) {
        const double last_y = line->last_y, last_x = line->last_x, low_y = line->low_y, low_x = line->low_x;
        const double y0 = line->y0, x0 = line->x0, dy = line->dy, dx = line->dx;
        const double edge_y = line->end_y + 0.5, edge_x = line->end_x + 0.5;
        const int cols = line->cols, most_y = (int)low_y + line->rows - 2, most_x = (int)low_x + cols - 2;
        const int base = (int)low_y * cols + (int)low_x;
        for (int i = 0; i < n; i++) {
            double y = y0 + dy * i + dir_y * shift[i], x = x0 + dx * i + dir_x * shift[i];
            int in = (y >= -0.5) & (y < edge_y) & (x >= -0.5) & (x < edge_x);
            y = y > low_y ? y : low_y; y = y < last_y ? y : last_y;
            x = x > low_x ? x : low_x; x = x < last_x ? x : last_x;
            int iy = (int)y, ix = (int)x;
            iy = iy < most_y ? iy : most_y;
            ix = ix < most_x ? ix : most_x;
            int fy = (int)((y - iy) * 128.0 + 0.5), fx = (int)((x - ix) * 128.0 + 0.5);
            int here = iy * cols + ix - base;
            at[i] = here | -(1 - in);
            near[i] = (here + (fy >> 6 ? cols : 0) + (fx >> 6 ? 1 : 0)) | -(1 - in);
            wy[i] = (128 - fy) | (fy << 16);
            wx[i] = (128 - fx) | (fx << 16);
        }
    }

    /* The shifts of a row that is merely cut out of the tile; 0 if it is not. */
    static int gp_cut_out(const float *shift, const gp_line *line, int n, float *moved) {
        if (line->dy != 0 || line->dx != 1 || line->y0 != floor(line->y0) || line->x0 != floor(line->x0)
            || line->y0 < line->low_y || line->y0 > line->last_y || line->x0 < line->low_x
            || line->x0 + (n - 1) > line->last_x)
            return 0;
        const Py_ssize_t row = (Py_ssize_t)(line->y0 - line->low_y), col = (Py_ssize_t)(line->x0 - line->low_x);
        memcpy(moved, shift + row * line->cols + col, n * sizeof(float));
        return 1;
    }

    /* First and last + 1 of the n columns of an output row whose places lie in the tile: they have no gap. */
    static void gp_span(const gp_line *line, int n, int *first, int *last) {
        double from = 0, to = n;
        const double start[2] = {line->y0, line->x0}, step[2] = {line->dy, line->dx};
        const double most[2] = {line->end_y + 0.5, line->end_x + 0.5};
        for (int axis = 0; axis < 2; axis++) {
            if (fabs(step[axis]) < 1e-6) { /* it may vanish when added: it tells no column */
                if (!(start[axis] >= -1.5 && start[axis] < most[axis] + 1))
                    to = 0;
                continue;
            }
            double a = (-0.5 - start[axis]) / step[axis], b = (most[axis] - start[axis]) / step[axis];
            double low = a < b ? a : b, high = a < b ? b : a;
            from = low > from ? low : from;
            to = high < to ? high : to;
        }
        /* One column to spare on each side for what division rounded; gp_places tests each place anyway. */
        int f = from < n ? (int)from - 1 : n, t = to > -1 ? (int)to + 2 : 0;
        f = f < 0 ? 0 : f;
        t = t > n ? n : t;
        *first = f < t ? f : 0;
        *last = f < t ? t : 0;
    }

    /* Columns first .. last of an output row that are outside. */
    static void gp_outside(int first, int last, const uint8_t *fill, uint8_t *rgb, float *agl, uint8_t *inside) {
        for (int i = first; i < last; i++)
            memcpy(rgb + 3 * i, fill, 3);
        if (agl)
            for (int i = first; i < last; i++)
                agl[i] = (float)NAN;
        if (last > first)
            memset(inside + first, 0, last - first);
    }

    /* Heights with the axes turned or mirrored: out[r, c] = in[r * row_step + c * col_step]. Where rows become columns,
       by squares of 8 x 8, within which every line of the cache that is touched is used up. */
    static void gp_turn_heights(const float *restrict agl, Py_ssize_t row_step, Py_ssize_t col_step, int rows, int cols,
                                float *restrict out) {
        if (col_step == 1 || col_step == -1) {
            for (int r = 0; r < rows; r++, agl += row_step, out += cols) {
                if (col_step == 1)
                    memcpy(out, agl, sizeof(float) * (size_t)cols);
                else
                    for (int c = 0; c < cols; c++)
                        out[c] = agl[-c];
            }
            return;
        }
        for (int top = 0; top < rows; top += 8)
            for (int left = 0; left < cols; left += 8) {
                const int high = rows - top < 8 ? rows - top : 8, wide = cols - left < 8 ? cols - left : 8;
                const float *from = agl + top * row_step + left * col_step;
                float *to = out + (Py_ssize_t)top * cols + left;
    #if defined(__SSE2__)
                if (high == 8 && wide == 8) {
                    const Py_ssize_t back = row_step < 0 ? -3 : 0, up = row_step < 0 ? -cols : cols;
                    for (int r = 0; r < 8; r += 4)
                        for (int c = 0; c < 8; c += 4) {
                            const float *f = from + r * row_step + c * col_step + back;
                            float *t = to + (Py_ssize_t)(row_step < 0 ? r + 3 : r) * cols + c;
                            __m128 v0 = _mm_loadu_ps(f), v1 = _mm_loadu_ps(f + col_step);
                            __m128 v2 = _mm_loadu_ps(f + 2 * col_step), v3 = _mm_loadu_ps(f + 3 * col_step);
                            _MM_TRANSPOSE4_PS(v0, v1, v2, v3);
                            _mm_storeu_ps(t, v0);
                            _mm_storeu_ps(t + up, v1);
                            _mm_storeu_ps(t + 2 * up, v2);
                            _mm_storeu_ps(t + 3 * up, v3);
                        }
                    continue;
                }
    #endif
                for (int r = 0; r < high; r++)
                    for (int c = 0; c < wide; c++)
                        to[(Py_ssize_t)r * cols + c] = from[r * row_step + c * col_step];
            }
    }

    /* Colours likewise, steps in pixels; by blocks, because one of the two sides may run against the grain. */
    static void gp_turn(const uint8_t *rgb, const uint8_t *rgb_end, Py_ssize_t row_step, Py_ssize_t col_step, int rows,
                        int cols, uint8_t *out_rgb) {
        const int side = col_step == 1 || col_step == -1 ? cols : 32;
        for (int top = 0; top < rows; top += 32)
            for (int left = 0; left < cols; left += side)
                for (int r = top; r < top + 32 && r < rows; r++) {
                    const int stop = left + side < cols ? left + side : cols;
                    const uint8_t *from = rgb + 3 * (r * row_step + left * col_step);
                    uint8_t *to = out_rgb + 3 * ((Py_ssize_t)r * cols + left);
                    if (col_step == 1) {
                        memcpy(to, from, 3 * (size_t)cols);
                        continue;
                    }
                    /* Four bytes at a time are quicker than three; the fourth is written again by the next pixel. */
                    for (int c = left; c < stop - 1; c++, from += 3 * col_step, to += 3)
                        memcpy(to, from, from + 4 <= rgb_end ? 4 : 3);
                    memcpy(to, from, 3);
                }
    }

    /* Bits of the floats at near[], all set where near is -1. Single loads beat AVX2's gather instruction, but four
       neighbours in a row are one load. */
    __attribute__((optimize("no-tree-vectorize")))
    static void gp_fetch(const float *restrict from, const int32_t *restrict near, int n, float *restrict out) {
        int i = 0;
    #if defined(__SSE2__)
        const __m128i count = _mm_setr_epi32(0, 1, 2, 3);
        for (; i + 4 <= n; i += 4) {
            const __m128i first = _mm_sub_epi32(_mm_loadu_si128((const __m128i *)(near + i)), count);
            if (near[i] >= 0 && _mm_movemask_epi8(_mm_cmpeq_epi32(first, _mm_shuffle_epi32(first, 0))) == 0xffff) {
                _mm_storeu_ps(out + i, _mm_loadu_ps(from + near[i]));
                continue;
            }
            for (int j = i; j < i + 4; j++) {
                int32_t outside = near[j] >> 31, bits;
                memcpy(&bits, &from[near[j] & ~outside], 4);
                bits |= outside;
                memcpy(&out[j], &bits, 4);
            }
        }
    #endif
        for (; i < n; i++) {
            int32_t outside = near[i] >> 31, bits;
            memcpy(&bits, &from[near[i] & ~outside], 4);
            bits |= outside;
            memcpy(&out[i], &bits, 4);
        }
    }

    /* Heights as they were, or of what moved by so much; h - h is NaN where h is not finite. */
    GP_CLONES static void gp_known(float *restrict out, int n) {
        for (int i = 0; i < n; i++)
            out[i] = (out[i] - out[i]) + out[i];
    }

    GP_CLONES static void gp_known_moved(float *restrict out, const float *restrict shift, int n, float per_shift) {
        for (int i = 0; i < n; i++)
            out[i] = (out[i] - out[i]) + shift[i] * per_shift;
    }

    static void gp_heights(const float *agl, int n, const int32_t *near, const float *shift, int raised,
                           float per_shift, float *out) {
        gp_fetch(agl, near, n, out);
        if (raised)
            gp_known_moved(out, shift, n, per_shift);
        else
            gp_known(out, n);
    }

    /* Ask for what rows further on will read. In a turned tile a pixel's neighbours lie in many rows, which no machine
       foresees by itself; every second pixel is enough, because neighbouring rows ask for the others. */
    static void gp_ahead(const void *base, int item, const int32_t *at, int n, Py_ssize_t away, int step) {
        for (int i = 0; i < n; i += step)
            __builtin_prefetch((const char *)base + ((Py_ssize_t)at[i] + away) * item);
    }

    GP_CLONES static int gp_inside(const int32_t *restrict at, int n, uint8_t *restrict inside) {
        int outside = 0;
        for (int i = 0; i < n; i++) {
            inside[i] = at[i] >= 0;
            outside += at[i] < 0;
        }
        return outside;
    }
    """
    void gp_places(const gp_line *line, const float *shift, double dir_y, double dir_x, int n,
                   int32_t *at, int32_t *wx, int32_t *wy, int32_t *near) noexcept nogil
    void gp_fetch(const float *source, const int32_t *near, int n, float *out) noexcept nogil
    void gp_ahead(const void *base, int item, const int32_t *at, int n, Py_ssize_t away, int step) noexcept nogil
    int gp_cut_out(const float *shift, const gp_line *line, int n, float *moved) noexcept nogil
    void gp_heights(const float *agl, int n, const int32_t *near, const float *shift, int raised, float per_shift,
                    float *out) noexcept nogil
    int gp_inside(const int32_t *at, int n, uint8_t *inside) noexcept nogil
    void gp_span(const gp_line *line, int n, int *first, int *last) noexcept nogil
    void gp_outside(int first, int last, const uint8_t *fill, uint8_t *rgb, float *agl, uint8_t *inside) noexcept nogil
    void gp_turn(const uint8_t *rgb, const uint8_t *rgb_end, Py_ssize_t row_step, Py_ssize_t col_step, int rows,
                 int cols, uint8_t *out_rgb) noexcept nogil
    void gp_turn_heights(const float *agl, Py_ssize_t row_step, Py_ssize_t col_step, int rows, int cols,
                         float *out) noexcept nogil


cdef enum:
    BLOCK_COLS = 1024
    CHUNK = 256  # pixels whose places and weights stay in the first cache meanwhile
    AHEAD = 4    # rows


def gather(const uint8_t[:, :, ::1] rgb, const float[:, ::1] agl_m, bint has_agl,
           const float[:, ::1] shift, bint raised, double dir_y, double dir_x, double agl_per_shift,
           const double[::1] matrix, Py_ssize_t rows, Py_ssize_t cols, const Py_ssize_t[::1] part,
           const uint8_t[::1] fill, uint8_t[:, :, ::1] out_rgb, float[:, ::1] out_agl, uint8_t[:, ::1] inside):
    """Fill the outputs; `matrix` maps output (r, c) to the place (m0 r + m1 c + m2, m3 r + m4 c + m5).

    The arrays hold `rows` and `cols` of the tile, or at least 2 of each (a single one is repeated); `part` is
    the first row and column of these, and rows and columns of the tile. Returns the number of pixels outside.
    Output goes by blocks of 64 rows, which in a turned tile are cut into strips of columns, so that what is read
    and written meanwhile stays in the cache and in the table of pages.
    """
    cdef Py_ssize_t out_rows = out_rgb.shape[0], out_cols = out_rgb.shape[1], r, c, top, left
    cdef Py_ssize_t outside = 0, strip = BLOCK_COLS
    cdef Py_ssize_t away
    cdef int n, first, last, done, some, step
    cdef double y0, x0
    cdef float *heights
    cdef int32_t at[CHUNK]
    cdef int32_t wx[CHUNK]
    cdef int32_t wy[CHUNK]
    cdef int32_t near[CHUNK]
    cdef float moved[CHUNK]
    cdef float still[CHUNK]
    cdef gp_line line
    line.rows = <int>rgb.shape[0]
    line.cols = <int>rgb.shape[1]
    line.low_y = part[0]
    line.low_x = part[1]
    line.last_y = part[0] + rows - 1
    line.last_x = part[1] + cols - 1
    line.end_y = part[2] - 1
    line.end_x = part[3] - 1
    line.dy = matrix[1]
    line.dx = matrix[4]
    # The wider a strip, the better for prefetching; but a strip's slant through the tile must fit the cache.
    if fabs(matrix[1]) * BLOCK_COLS > 64:
        strip = 128
    away = <Py_ssize_t>(matrix[0] * AHEAD) * line.cols + <Py_ssize_t>(matrix[3] * AHEAD)
    step = 2 if strip < BLOCK_COLS else 16  # a line of the cache is 16 heights or 21 colours
    with nogil:
        for c in range(CHUNK):
            moved[c] = 0.0
            still[c] = 0.0
        top = 0
        left = 0
        while top < out_rows:
            n = <int>(out_cols - left if out_cols - left < strip else strip)
            for r in range(top, top + 64 if top + 64 < out_rows else out_rows):
                line.y0 = matrix[0] * r + matrix[1] * left + matrix[2]
                line.x0 = matrix[3] * r + matrix[4] * left + matrix[5]
                gp_span(&line, n, &first, &last)
                heights = &out_agl[r, left] if has_agl else NULL
                if first > 0 or last < n:
                    gp_outside(0, first, &fill[0], &out_rgb[r, left, 0], heights, &inside[r, left])
                    gp_outside(last, n, &fill[0], &out_rgb[r, left, 0], heights, &inside[r, left])
                    outside += n - (last - first)
                    if first == last:
                        continue
                    line.y0 = line.y0 + first * line.dy
                    line.x0 = line.x0 + first * line.dx
                c = left + first
                last = last - first
                y0 = line.y0
                x0 = line.x0
                done = 0
                while done < last:
                    some = last - done if last - done < CHUNK else CHUNK
                    line.y0 = y0 + done * line.dy
                    line.x0 = x0 + done * line.dx
                    if raised and not gp_cut_out(&shift[0, 0], &line, some, moved):
                        gp_places(&line, still, 0.0, 0.0, some, at, wx, wy, near)
                        gp_ahead(&shift[0, 0], 4, near, some, away, step)
                        gp_fetch(&shift[0, 0], near, some, moved)
                    gp_places(&line, moved, dir_y, dir_x, some, at, wx, wy, near)
                    gp_ahead(&rgb[0, 0, 0], 3, at, some, away, step)
                    if has_agl:
                        gp_ahead(&agl_m[0, 0], 4, at, some, away, step)
                    gp_colours(&rgb[0, 0, 0], &line, some, at, wx, wy, &fill[0], &out_rgb[r, c + done, 0])
                    if has_agl:
                        gp_heights(&agl_m[0, 0], some, near, moved, raised, <float>agl_per_shift,
                                   &out_agl[r, c + done])
                    outside += gp_inside(at, some, &inside[r, c + done])
                    done = done + CHUNK
            left = left + strip
            if left >= out_cols:
                left = 0
                top = top + 64
    return outside


def turn(const uint8_t[:, :, ::1] rgb, const float[:, ::1] agl_m, bint has_agl, Py_ssize_t first, Py_ssize_t row_step,
         Py_ssize_t col_step, uint8_t[:, :, ::1] out_rgb, float[:, ::1] out_agl):
    """out[r, c] = tile[first + r * row_step + c * col_step], counted in pixels: right angles, flips, crops."""
    cdef const uint8_t *start = &rgb[0, 0, 0]
    cdef const uint8_t *end = start + 3 * rgb.shape[0] * rgb.shape[1]
    with nogil:
        gp_turn(start + 3 * first, end, row_step, col_step, <int>out_rgb.shape[0], <int>out_rgb.shape[1],
                &out_rgb[0, 0, 0])
        if has_agl:
            gp_turn_heights(&agl_m[0, 0] + first, row_step, col_step, <int>out_rgb.shape[0], <int>out_rgb.shape[1],
                            &out_agl[0, 0])


def tone(uint8_t[:, :, ::1] rgb, const uint8_t[:, ::1] table, const signed char[::1] noise,
         const uint8_t[::1] random, bint noisy):
    """In place: table[channel, value], then, if noisy, plus noise[random byte], clipped to 0 .. 255."""
    cdef Py_ssize_t rows = rgb.shape[0], cols = rgb.shape[1], y, x, c, i = 0
    cdef int v
    with nogil:
        for y in range(rows):
            for x in range(cols):
                for c in range(3):
                    v = table[c, rgb[y, x, c]]
                    if noisy:
                        v = v + noise[random[i]]
                        v = 0 if v < 0 else (255 if v > 255 else v)
                        i = i + 1
                    rgb[y, x, c] = <uint8_t>v
