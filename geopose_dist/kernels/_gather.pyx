# cython: language_level=3
"""One-pass gather: each output pixel fetches its colour and height through the composed map.

The map is an affine (output row and column to a place in the raised tile), followed, where heights are
raised, by the shift of the surface seen there along the flow direction. So a sample is resampled once, however
many operations it goes through. Colours are bilinear with weights of 1/128, heights nearest: averaging
over a roof's edge would invent surfaces. Outside the tile: fill colour, NaN, inside = 0.
"""

from libc.math cimport fabs

from libc.stdint cimport int32_t, uint8_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__SSE2__)
    #include <emmintrin.h>
    #endif
    #if defined(__GNUC__) && defined(__x86_64__)
    #include <immintrin.h>
    #define GP_AVX2 1
    #endif
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) \
        && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    #define GP_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define GP_CLONES
    #endif

    typedef struct {
        double y0, x0;         /* place of column 0 of this output row */
        double dy, dx;         /* what the next column adds */
        double end_y, end_x;   /* last row and column of the tile */
        double low_y, low_x;   /* first row and column of the part of it that the arrays hold */
        double last_y, last_x; /* last row and column of that part */
        int rows, cols;        /* of the arrays, at least 2 each */
    } gp_line;

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

    /* The shifts at the pixels nearest to the places of one output row, NaN outside. A row that is merely cut
       out is copied. Not vectorised: single loads beat AVX2's gather instruction and its imitations. */
    __attribute__((optimize("no-tree-vectorize")))
    static void gp_moved(const float *restrict shift, const int32_t *restrict near, int n, float *restrict moved) {
        for (int i = 0; i < n; i++) {
            int32_t outside = near[i] >> 31, bits;
            memcpy(&bits, &shift[near[i] & ~outside], 4);
            bits |= outside;
            memcpy(&moved[i], &bits, 4);
        }
    }

    static int gp_cut_out(const float *shift, const gp_line *line, int n, float *moved) {
        if (line->dy != 0 || line->dx != 1 || line->y0 != floor(line->y0) || line->x0 != floor(line->x0)
            || line->y0 < line->low_y || line->y0 > line->last_y || line->x0 < line->low_x
            || line->x0 + (n - 1) > line->last_x)
            return 0;
        const Py_ssize_t row = (Py_ssize_t)(line->y0 - line->low_y), col = (Py_ssize_t)(line->x0 - line->low_x);
        memcpy(moved, shift + row * line->cols + col, n * sizeof(float));
        return 1;
    }

    /* Bilinear colour of the pixels at p0, p0 + 3, p1, p1 + 3. Exact integers, so every build gives the same
       bytes: (top * (128 - wy) + bottom * wy + 8192) >> 14, where top and bottom have 15 bits. */
    static inline void gp_bilinear_plain(const uint8_t *p0, const uint8_t *p1, int32_t wx, int32_t wy, uint8_t *out) {
        int a = wx & 0xffff, b = wx >> 16;
        for (int c = 0; c < 3; c++)
            out[c] = (uint8_t)(((p0[c] * a + p0[c + 3] * b) * (wy & 0xffff)
                                + (p1[c] * a + p1[c + 3] * b) * (wy >> 16) + 8192) >> 14);
    }

    /* The same by SSE2, the baseline of x86-64; reads 7 bytes from p0 and p1, writes 4 to out. */
    static inline void gp_bilinear(const uint8_t *p0, const uint8_t *p1, int32_t wx, int32_t wy, uint8_t *out) {
    #if defined(__SSE2__)
        int32_t a, b, c, d;
        memcpy(&a, p0, 4); memcpy(&b, p0 + 3, 4); memcpy(&c, p1, 4); memcpy(&d, p1 + 3, 4);
        const __m128i zero = _mm_setzero_si128(), wh = _mm_set1_epi32(wx), wv = _mm_set1_epi32(wy);
        __m128i top = _mm_unpacklo_epi8(_mm_unpacklo_epi8(_mm_cvtsi32_si128(a), _mm_cvtsi32_si128(b)), zero);
        __m128i bottom = _mm_unpacklo_epi8(_mm_unpacklo_epi8(_mm_cvtsi32_si128(c), _mm_cvtsi32_si128(d)), zero);
        top = _mm_madd_epi16(top, wh);
        bottom = _mm_madd_epi16(bottom, wh);
        __m128i sum = _mm_madd_epi16(_mm_or_si128(top, _mm_slli_epi32(bottom, 16)), wv);
        sum = _mm_srli_epi32(_mm_add_epi32(sum, _mm_set1_epi32(8192)), 14);
        sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), zero);
        a = _mm_cvtsi128_si32(sum);
        memcpy(out, &a, 4);
    #else
        gp_bilinear_plain(p0, p1, wx, wy, out);
    #endif
    }

    /* Colours of one output row; the plain form where the quick one would read or write past an end. */
    static void gp_colours_plain(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                                 const int32_t *wy, const uint8_t *fill, uint8_t *out) {
        const int32_t stride = 3 * line->cols, end = (line->rows - 2) * line->cols + line->cols - 2;
        for (int i = 0; i < n; i++, out += 3) {
            const uint8_t *p = rgb + 3 * (Py_ssize_t)at[i];
            if (at[i] < 0)
                memcpy(out, fill, 3);
            else if (at[i] == end || i == n - 1)
                gp_bilinear_plain(p, p + stride, wx[i], wy[i], out);
            else
                gp_bilinear(p, p + stride, wx[i], wy[i], out);
        }
    }

    #ifdef GP_AVX2
    /* The same sums for two pixels at a time where the machine has AVX2. Top and bottom of a pixel are the halves of
       a register; reads 8 bytes from each row, which is past the end for the very last place only. */
    __attribute__((target("avx2")))
    static void gp_colours_avx2(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                                const int32_t *wy, const uint8_t *fill, uint8_t *out) {
        const int32_t stride = 3 * line->cols, end = (line->rows - 2) * line->cols + line->cols - 2;
        /* bytes R0 G0 B0 R1 G1 B1 to 16-bit R0 R1 G0 G1 B0 B1 */
        const __m128i pairs = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
        const __m256i both = _mm256_broadcastsi128_si256(pairs), half = _mm256_set1_epi32(8192);
        int i = 0;
        for (; i + 2 < n; i += 2, out += 6) {
            if ((at[i] | at[i + 1]) < 0 || at[i] == end || at[i + 1] == end) {
                gp_colours_plain(rgb, line, 2, at + i, wx + i, wy + i, fill, out);
                continue;
            }
            const uint8_t *p = rgb + 3 * (Py_ssize_t)at[i], *q = rgb + 3 * (Py_ssize_t)at[i + 1];
            __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)p)),
                                                _mm_loadl_epi64((const __m128i *)(p + stride)), 1);
            __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)q)),
                                                _mm_loadl_epi64((const __m128i *)(q + stride)), 1);
            a = _mm256_madd_epi16(_mm256_shuffle_epi8(a, both), _mm256_set1_epi32(wx[i]));
            b = _mm256_madd_epi16(_mm256_shuffle_epi8(b, both), _mm256_set1_epi32(wx[i + 1]));
            /* tops of both pixels, bottoms of both pixels, then weigh them against each other */
            __m256i top = _mm256_permute2x128_si256(a, b, 0x20), bottom = _mm256_permute2x128_si256(a, b, 0x31);
            __m256i wv = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(wy[i])),
                                                 _mm_set1_epi32(wy[i + 1]), 1);
            __m256i sum = _mm256_madd_epi16(_mm256_or_si256(top, _mm256_slli_epi32(bottom, 16)), wv);
            sum = _mm256_srli_epi32(_mm256_add_epi32(sum, half), 14);
            sum = _mm256_packus_epi16(_mm256_packs_epi32(sum, sum), sum);
            int32_t first = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
            int32_t second = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
            memcpy(out, &first, 4);
            memcpy(out + 3, &second, 4);
        }
        gp_colours_plain(rgb, line, n - i, at + i, wx + i, wy + i, fill, out);
    }
    #endif

    static void gp_colours(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                           const int32_t *wy, const uint8_t *fill, uint8_t *out) {
    #ifdef GP_AVX2
        if (__builtin_cpu_supports("avx2")) {
            gp_colours_avx2(rgb, line, n, at, wx, wy, fill, out);
            return;
        }
    #endif
        gp_colours_plain(rgb, line, n, at, wx, wy, fill, out);
    }

    /* First and last + 1 of the n columns of an output row whose places lie in the tile: they have no gap. */
    static void gp_span(const gp_line *line, int n, int *first, int *last) {
        double from = 0, to = n;
        const double start[2] = {line->y0, line->x0}, step[2] = {line->dy, line->dx};
        const double most[2] = {line->end_y + 0.5, line->end_x + 0.5};
        for (int axis = 0; axis < 2; axis++) {
            if (step[axis] == 0) {
                if (!(start[axis] >= -0.5 && start[axis] < most[axis]))
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

    /* Copy with the axes turned or mirrored: out[r, c] = in[r * row_step + c * col_step], steps in pixels.
       By blocks, because one of the two sides may run against the grain of the memory. */
    static void gp_turn(const uint8_t *rgb, const uint8_t *rgb_end, const float *agl, int agl_too, Py_ssize_t row_step,
                        Py_ssize_t col_step, int rows, int cols, uint8_t *out_rgb, float *out_agl) {
        const int side = col_step == 1 || col_step == -1 ? cols : 32;
        for (int top = 0; top < rows; top += 32)
            for (int left = 0; left < cols; left += side)
                for (int r = top; r < top + 32 && r < rows; r++) {
                    const int stop = left + side < cols ? left + side : cols;
                    const uint8_t *from = rgb + 3 * (r * row_step + left * col_step);
                    const float *high = agl + (agl_too ? r * row_step : 0);
                    uint8_t *to = out_rgb + 3 * ((Py_ssize_t)r * cols + left);
                    float *low = out_agl + (agl_too ? (Py_ssize_t)r * cols : 0);
                    if (col_step == 1) {
                        memcpy(to, from, 3 * (size_t)cols);
                        if (agl_too)
                            memcpy(low, high, sizeof(float) * (size_t)cols);
                        continue;
                    }
                    /* Four bytes at a time are quicker than three; the fourth is written again by the next pixel. */
                    for (int c = left; c < stop - 1; c++, from += 3 * col_step, to += 3)
                        memcpy(to, from, from + 4 <= rgb_end ? 4 : 3);
                    memcpy(to, from, 3);
                    if (agl_too)
                        for (int c = left; c < stop; c++)
                            low[c] = high[c * col_step];
                }
    }

    /* Heights of one output row from the nearest pixels; where raised, the shift times per_shift if that pixel's
       height is known. No conditions, which rotation makes unpredictable: h - h is NaN where h is not finite,
       and all bits set outside are NaN as well. */
    __attribute__((optimize("no-tree-vectorize")))
    static void gp_heights(const float *restrict agl, int n, const int32_t *restrict near, const float *restrict shift,
                           int raised, float per_shift, float *restrict out) {
        for (int i = 0; i < n; i++) {
            int32_t outside = near[i] >> 31, bits;
            float h = agl[near[i] & ~outside];
            h = (h - h) + (raised ? shift[i] * per_shift : h);
            memcpy(&bits, &h, 4);
            bits |= outside;
            memcpy(&out[i], &bits, 4);
        }
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
    ctypedef struct gp_line:
        double y0, x0, dy, dx, end_y, end_x, low_y, low_x, last_y, last_x
        int rows, cols
    void gp_places(const gp_line *line, const float *shift, double dir_y, double dir_x, int n,
                   int32_t *at, int32_t *wx, int32_t *wy, int32_t *near) noexcept nogil
    void gp_moved(const float *shift, const int32_t *near, int n, float *moved) noexcept nogil
    int gp_cut_out(const float *shift, const gp_line *line, int n, float *moved) noexcept nogil
    void gp_colours(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                    const int32_t *wy, const uint8_t *fill, uint8_t *out) noexcept nogil
    void gp_heights(const float *agl, int n, const int32_t *near, const float *shift, int raised, float per_shift,
                    float *out) noexcept nogil
    int gp_inside(const int32_t *at, int n, uint8_t *inside) noexcept nogil
    void gp_span(const gp_line *line, int n, int *first, int *last) noexcept nogil
    void gp_outside(int first, int last, const uint8_t *fill, uint8_t *rgb, float *agl, uint8_t *inside) noexcept nogil
    void gp_turn(const uint8_t *rgb, const uint8_t *rgb_end, const float *agl, int agl_too, Py_ssize_t row_step,
                 Py_ssize_t col_step, int rows, int cols, uint8_t *out_rgb, float *out_agl) noexcept nogil


cdef enum:
    BLOCK_COLS = 1024


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
    cdef int n, first, last
    cdef float *heights
    cdef int32_t at[BLOCK_COLS]
    cdef int32_t wx[BLOCK_COLS]
    cdef int32_t wy[BLOCK_COLS]
    cdef int32_t near[BLOCK_COLS]
    cdef float moved[BLOCK_COLS]
    cdef float still[BLOCK_COLS]
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
    with nogil:
        for c in range(BLOCK_COLS):
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
                if raised and not gp_cut_out(&shift[0, 0], &line, last, moved):
                    gp_places(&line, still, 0.0, 0.0, last, at, wx, wy, near)
                    gp_moved(&shift[0, 0], near, last, moved)
                gp_places(&line, moved, dir_y, dir_x, last, at, wx, wy, near)
                gp_colours(&rgb[0, 0, 0], &line, last, at, wx, wy, &fill[0], &out_rgb[r, c, 0])
                if has_agl:
                    gp_heights(&agl_m[0, 0], last, near, moved, raised, <float>agl_per_shift, &out_agl[r, c])
                outside += gp_inside(at, last, &inside[r, c])
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
        gp_turn(start + 3 * first, end, &agl_m[0, 0] + (first if has_agl else 0), has_agl, row_step, col_step,
                <int>out_rgb.shape[0], <int>out_rgb.shape[1], &out_rgb[0, 0, 0], &out_agl[0, 0])


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
