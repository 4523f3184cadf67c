"""What the synthetic renderer's rays meet, without colours: surfaces seen, and cells in the sun; doors in render.py.

The marches themselves are in _rays.pxd. No Python object is touched inside the loops, so threads may run them side
by side.
"""

from libc.stdint cimport uint8_t

from geopose_dist.kernels._rays cimport Hit, Scene, View, begin, fill_scene, fill_view, look, sunlit

cdef enum:
    PATCH = 16  # pixels of a square whose rays begin together


def trace(const float[:, ::1] height, const float[:, ::1] ground, const float[:, ::1] fine,
          const float[:, ::1] coarse, float top, const double[::1] camera, float[:, ::1] agl, float[:, ::1] row,
          float[:, ::1] col, uint8_t[:, ::1] kind):
    """Fill agl (m), row and col (cells), kind (0 top, 1 wall) of the surface seen by each pixel centre.

    `ground` is the bare ground's height, or an array of no cells where it is zero everywhere.
    """
    cdef Scene s
    cdef View v
    cdef Hit hit
    cdef Py_ssize_t y, x, down, over, top_y, left, end_y, end_x
    cdef double start
    with nogil:
        fill_scene(&s, height, ground, fine, coarse, 1, top)
        fill_view(&v, camera)
        for down in range((agl.shape[0] + PATCH - 1) // PATCH):
            top_y = PATCH * down
            end_y = min(top_y + PATCH, agl.shape[0])
            for over in range((agl.shape[1] + PATCH - 1) // PATCH):
                left = PATCH * over
                end_x = min(left + PATCH, agl.shape[1])
                start = begin(&s, &v, left, top_y, end_x - 1, end_y - 1)
                for y in range(top_y, end_y):
                    for x in range(left, end_x):
                        hit = look(&s, &v, <double>x, <double>y, start)
                        agl[y, x] = hit.agl
                        row[y, x] = hit.at_row
                        col[y, x] = hit.at_col
                        kind[y, x] = hit.kind


def shadow(const float[:, ::1] height, const float[:, ::1] fine, const float[:, ::1] coarse, float top,
           double run_col, double run_row, float lift, uint8_t[:, ::1] lit):
    """Fill lit (1 where the sun is seen from `lift` metres above the middle of a cell)."""
    cdef Scene s
    cdef Py_ssize_t y, x
    with nogil:
        fill_scene(&s, height, height[:0], fine, coarse, 1, top)
        for y in range(lit.shape[0]):
            for x in range(lit.shape[1]):
                lit[y, x] = sunlit(&s, x + 0.5, y + 0.5, height[y, x] + lift, run_col, run_row)


def visible(const float[:, ::1] height, const float[:, ::1] fine, const float[:, ::1] coarse, float top,
            const double[::1] camera, const float[:, ::1] row, const float[:, ::1] col, uint8_t[:, ::1] seen):
    """Fill seen (1 where the camera sees the top of the cell at (row, col), its middle being 2 cm above it)."""
    cdef Scene s
    cdef View v
    cdef Py_ssize_t y, x
    cdef float at
    with nogil:
        fill_scene(&s, height, height[:0], fine, coarse, 1, top)
        fill_view(&v, camera)
        for y in range(seen.shape[0]):
            for x in range(seen.shape[1]):
                at = height[<Py_ssize_t>row[y, x], <Py_ssize_t>col[y, x]]
                seen[y, x] = sunlit(&s, col[y, x], row[y, x], at + 0.02, v.rise_col, v.rise_row)
