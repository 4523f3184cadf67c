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
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) \
        && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    #define GP_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define GP_CLONES
    #endif

    typedef struct {
        double y0, x0;         /* place of column 0 of this output row */
        double dy, dx;         /* what the next column adds */
        double last_y, last_x; /* last row and column of the tile */
        int rows, cols;        /* of the arrays, at least 2 each */
    } gp_line;

    /* Places of one output row, moved by shift along (dir_y, dir_x): at[i] = element of the upper left of
       the four neighbours or -1 outside, and their weights, two 16-bit numbers each that sum to 128. Half a
       pixel around the outermost centres still is image. NaN compares as outside. */
    GP_CLONES static void gp_places(const gp_line *line, const float *restrict shift, double dir_y, double dir_x,
                                    int n, int32_t *restrict at, int32_t *restrict wx, int32_t *restrict wy) {
        const double last_y = line->last_y, last_x = line->last_x;
        const double y0 = line->y0, x0 = line->x0, dy = line->dy, dx = line->dx;
        const int most_y = line->rows - 2, most_x = line->cols - 2, cols = line->cols;
        for (int i = 0; i < n; i++) {
            double y = y0 + dy * i + dir_y * shift[i], x = x0 + dx * i + dir_x * shift[i];
            int in = (y >= -0.5) & (y < last_y + 0.5) & (x >= -0.5) & (x < last_x + 0.5);
            y = y > 0 ? y : 0; y = y < last_y ? y : last_y;
            x = x > 0 ? x : 0; x = x < last_x ? x : last_x;
            int iy = (int)y, ix = (int)x;
            iy = iy < most_y ? iy : most_y;
            ix = ix < most_x ? ix : most_x;
            int fy = (int)((y - iy) * 128.0 + 0.5), fx = (int)((x - ix) * 128.0 + 0.5);
            at[i] = (iy * cols + ix) | -(1 - in);
            wy[i] = (128 - fy) | (fy << 16);
            wx[i] = (128 - fx) | (fx << 16);
        }
    }

    /* The shifts at the pixels nearest to the places of one output row, NaN outside; `at` and the weights
       are work space. A row that is merely cut out is copied. */
    static void gp_moved(const float *restrict shift, const gp_line *line, int n, int32_t *restrict at,
                         int32_t *restrict wx, int32_t *restrict wy, float *restrict moved) {
        if (line->dy == 0 && line->dx == 1 && line->y0 >= 0 && line->y0 <= line->last_y && line->x0 >= 0
            && line->x0 + (n - 1) <= line->last_x && line->y0 == floor(line->y0) && line->x0 == floor(line->x0)) {
            memcpy(moved, shift + (Py_ssize_t)line->y0 * line->cols + (Py_ssize_t)line->x0, n * sizeof(float));
            return;
        }
        memset(moved, 0, n * sizeof(float));
        gp_places(line, moved, 0, 0, n, at, wx, wy);
        for (int i = 0; i < n; i++) {
            int32_t outside = at[i] >> 31, bits;
            int32_t from = (at[i] + ((wy[i] >> 22) != 0) * line->cols + ((wx[i] >> 22) != 0)) & ~outside;
            memcpy(&bits, &shift[from], 4);
            bits |= outside;
            memcpy(&moved[i], &bits, 4);
        }
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
    static void gp_colours(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
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

    /* Heights of one output row, from the nearest of the four neighbours; where raised, the shift times
       per_shift if that neighbour is known. No conditions, which rotation makes unpredictable: h - h is NaN
       where h is not finite, and all bits set outside are NaN as well. Not cloned: AVX2's gather instruction
       is slower than single loads. */
    static void gp_heights(const float *restrict agl, const gp_line *line, int n, const int32_t *restrict at,
                           const int32_t *restrict wx, const int32_t *restrict wy, const float *restrict shift,
                           int raised, float per_shift, float *restrict out) {
        const int cols = line->cols;
        for (int i = 0; i < n; i++) {
            int32_t outside = at[i] >> 31, bits;
            int32_t from = (at[i] + ((wy[i] >> 22) != 0) * cols + ((wx[i] >> 22) != 0)) & ~outside;
            float h = agl[from];
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
        double y0, x0, dy, dx, last_y, last_x
        int rows, cols
    void gp_places(const gp_line *line, const float *shift, double dir_y, double dir_x, int n,
                   int32_t *at, int32_t *wx, int32_t *wy) noexcept nogil
    void gp_moved(const float *shift, const gp_line *line, int n, int32_t *at, int32_t *wx, int32_t *wy,
                  float *moved) noexcept nogil
    void gp_colours(const uint8_t *rgb, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                    const int32_t *wy, const uint8_t *fill, uint8_t *out) noexcept nogil
    void gp_heights(const float *agl, const gp_line *line, int n, const int32_t *at, const int32_t *wx,
                    const int32_t *wy, const float *shift, int raised, float per_shift, float *out) noexcept nogil
    int gp_inside(const int32_t *at, int n, uint8_t *inside) noexcept nogil


cdef enum:
    BLOCK_COLS = 1024


def gather(const uint8_t[:, :, ::1] rgb, const float[:, ::1] agl_m, bint has_agl,
           const float[:, ::1] shift, bint raised, double dir_y, double dir_x, double agl_per_shift,
           const double[::1] matrix, Py_ssize_t rows, Py_ssize_t cols, const uint8_t[::1] fill,
           uint8_t[:, :, ::1] out_rgb, float[:, ::1] out_agl, uint8_t[:, ::1] inside):
    """Fill the outputs; `matrix` maps output (r, c) to the place (m0 r + m1 c + m2, m3 r + m4 c + m5).

    The tile has `rows` and `cols`, its arrays at least 2 of each (a single one is repeated). Returns the number
    of pixels outside. Output goes by strips of columns, so that the rows of a turned tile stay in the cache.
    """
    cdef Py_ssize_t out_rows = out_rgb.shape[0], out_cols = out_rgb.shape[1], r, c, left, outside = 0, strip = BLOCK_COLS
    cdef int n
    cdef int32_t at[BLOCK_COLS]
    cdef int32_t wx[BLOCK_COLS]
    cdef int32_t wy[BLOCK_COLS]
    cdef float moved[BLOCK_COLS]
    cdef gp_line line
    line.rows = <int>rgb.shape[0]
    line.cols = <int>rgb.shape[1]
    line.last_y = rows - 1
    line.last_x = cols - 1
    line.dy = matrix[1]
    line.dx = matrix[4]
    # The wider a strip, the better the memory's prefetching; but a strip's slant through the tile must fit the cache.
    if fabs(matrix[1]) * BLOCK_COLS > 64:
        strip = 128
    with nogil:
        for c in range(BLOCK_COLS):
            moved[c] = 0.0
        left = 0
        while left < out_cols:
            n = <int>(out_cols - left if out_cols - left < strip else strip)
            for r in range(out_rows):
                line.y0 = matrix[0] * r + matrix[1] * left + matrix[2]
                line.x0 = matrix[3] * r + matrix[4] * left + matrix[5]
                if raised:
                    gp_moved(&shift[0, 0], &line, n, at, wx, wy, moved)
                gp_places(&line, moved, dir_y, dir_x, n, at, wx, wy)
                gp_colours(&rgb[0, 0, 0], &line, n, at, wx, wy, &fill[0], &out_rgb[r, left, 0])
                if has_agl:
                    gp_heights(&agl_m[0, 0], &line, n, at, wx, wy, moved, raised, <float>agl_per_shift,
                               &out_agl[r, left])
                outside += gp_inside(at, n, &inside[r, left])
            left = left + strip
    return outside


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
