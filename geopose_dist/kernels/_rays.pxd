# The marches of the synthetic renderer along sight lines and sun rays, shared by what traces and what shades.
#
# A height map of square cells with vertical walls between them is met exactly: a ray visits its cells in
# order (the traversal of Amanatides and Woo, 1987) and two coarser maps of block maxima let it skip blocks
# that lie wholly below it. Pixels that are neighbours begin together, where the first of them could meet anything.
from libc.math cimport fabs, floor
from libc.stdint cimport int32_t

cdef enum:
    FINE = 3    # blocks of 8 x 8 cells
    COARSE = 6  # blocks of 64 x 64 cells
    TOP = 0
    WALL = 1

cdef struct Scene:
    const float* height   # of the surface above the map's zero
    const float* ground   # of the bare ground, or NULL where that is zero everywhere
    const float* fine
    const float* coarse
    const float* shade    # per cell, the heights above which no and all of the sun's disc is hidden
    const float* near     # per 4 x 4 cells: mean height around, and a slow texture
    const int32_t* ids
    const float* objects
    const float* gains
    const float* noise    # two textures side by side: fine and four times as coarse
    Py_ssize_t rows
    Py_ssize_t cols
    Py_ssize_t fine_cols
    Py_ssize_t coarse_cols
    Py_ssize_t near_cols
    Py_ssize_t noise_mask
    Py_ssize_t shade_row  # floats from row to row and from column to column of `shade`
    Py_ssize_t shade_col
    float cell
    float top

cdef struct View:
    # Cell of a pixel at height 0: col = col_x * x + col_y * y + col_0; it moves by rise_* cells per metre of height.
    double col_x
    double col_y
    double col_0
    double row_x
    double row_y
    double row_0
    double rise_col
    double rise_row
    double per_col  # metres of height per cell, 0 where the line of sight does not move that way
    double per_row

cdef struct Hit:
    Py_ssize_t row
    Py_ssize_t col
    float at_row
    float at_col
    float at    # height above the map's zero
    float agl   # above the ground of its cell
    int kind


cdef inline double crossing(double origin, double per_cell, Py_ssize_t low, Py_ssize_t size) noexcept nogil:
    """Height at which a falling ray at column or row `origin` + h / per_cell leaves [low, low + size); -1: never."""
    if per_cell > 0:
        return (low - origin) * per_cell
    if per_cell < 0:
        return (low + size - origin) * per_cell
    return -1


cdef inline Py_ssize_t clamp(double value, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    cdef Py_ssize_t whole = <Py_ssize_t>value  # truncation: what it does below 0, low mends
    if whole < low:
        return low
    if whole > high:
        return high
    return whole


cdef inline float ground_at(Scene* s, Py_ssize_t cell) noexcept nogil:
    return s.ground[cell] if s.ground != NULL else 0


cdef inline double begin(Scene* s, View* v, double x0, double y0, double x1, double y1) noexcept nogil:
    """A height from which all lines of sight of the pixels in [x0, x1] x [y0, y1] may start: above it, none meets
    anything."""
    cdef double reach = fabs(v.rise_col) if fabs(v.rise_col) > fabs(v.rise_row) else fabs(v.rise_row)
    cdef double step = 8 / reach if reach > 0 else 1e30
    cdef double high = s.top
    cdef double low, least_col, most_col, least_row, most_row
    cdef Py_ssize_t r, c, r0, r1, c0, c1
    cdef float tallest
    least_col = v.col_0 + (v.col_x * (x0 if v.col_x > 0 else x1)) + (v.col_y * (y0 if v.col_y > 0 else y1))
    most_col = v.col_0 + (v.col_x * (x1 if v.col_x > 0 else x0)) + (v.col_y * (y1 if v.col_y > 0 else y0))
    least_row = v.row_0 + (v.row_x * (x0 if v.row_x > 0 else x1)) + (v.row_y * (y0 if v.row_y > 0 else y1))
    most_row = v.row_0 + (v.row_x * (x1 if v.row_x > 0 else x0)) + (v.row_y * (y1 if v.row_y > 0 else y0))
    while high > 0:
        low = high - step if high > step else 0
        c0 = clamp(least_col + v.rise_col * (low if v.rise_col > 0 else high) - 0.01, 0, s.cols - 1)
        c1 = clamp(most_col + v.rise_col * (high if v.rise_col > 0 else low) + 0.01, 0, s.cols - 1)
        r0 = clamp(least_row + v.rise_row * (low if v.rise_row > 0 else high) - 0.01, 0, s.rows - 1)
        r1 = clamp(most_row + v.rise_row * (high if v.rise_row > 0 else low) + 0.01, 0, s.rows - 1)
        tallest = 0
        for r in range(r0 >> COARSE, (r1 >> COARSE) + 1):
            for c in range(c0 >> COARSE, (c1 >> COARSE) + 1):
                if s.coarse[r * s.coarse_cols + c] > tallest:
                    tallest = s.coarse[r * s.coarse_cols + c]
        if tallest >= low:
            tallest = 0
            for r in range(r0 >> FINE, (r1 >> FINE) + 1):
                for c in range(c0 >> FINE, (c1 >> FINE) + 1):
                    if s.fine[r * s.fine_cols + c] > tallest:
                        tallest = s.fine[r * s.fine_cols + c]
            if tallest >= low:
                return tallest if tallest < high else high
        high = low
    return 0


cdef inline Hit look(Scene* s, View* v, double x, double y, double start) noexcept nogil:
    """First surface on the line of sight of pixel (x, y), coming from height `start`, above which it meets nothing."""
    cdef double col0 = v.col_x * x + v.col_y * y + v.col_0
    cdef double row0 = v.row_x * x + v.row_y * y + v.row_0
    cdef double h = start
    cdef double leave_col, leave_row, below
    cdef Py_ssize_t col = clamp(col0 + h * v.rise_col, 0, s.cols - 1)
    cdef Py_ssize_t row = clamp(row0 + h * v.rise_row, 0, s.rows - 1)
    cdef Py_ssize_t next_col = -1 if v.rise_col > 0 else 1  # a falling ray runs against its rise
    cdef Py_ssize_t next_row = -1 if v.rise_row > 0 else 1
    cdef Py_ssize_t low_row, low_col, shift, size, block_row, block_col
    cdef float block
    cdef Hit hit
    hit.kind = -1
    while 0 <= col < s.cols and 0 <= row < s.rows:
        shift = COARSE
        block = s.coarse[(row >> COARSE) * s.coarse_cols + (col >> COARSE)]
        if block >= h:
            shift = FINE
            block = s.fine[(row >> FINE) * s.fine_cols + (col >> FINE)]
        if block < h:  # the block lies below: to its far side, or down onto its highest top
            size = (<Py_ssize_t>1) << shift
            low_row = (row >> shift) << shift
            low_col = (col >> shift) << shift
            leave_col = crossing(col0, v.per_col, low_col, size)
            leave_row = crossing(row0, v.per_row, low_row, size)
            below = leave_col if leave_col > leave_row else leave_row
            if below < block:
                below = block
            if below < h:  # rounding may put a crossing a hair above: never climb
                h = below
            if leave_col >= leave_row and leave_col >= below:
                col = low_col - 1 if v.rise_col > 0 else low_col + size
                row = clamp(row0 + below * v.rise_row, low_row, low_row + size - 1)
            elif leave_row >= below:
                row = low_row - 1 if v.rise_row > 0 else low_row + size
                col = clamp(col0 + below * v.rise_col, low_col, low_col + size - 1)
            else:
                col = clamp(col0 + below * v.rise_col, low_col, low_col + size - 1)
                row = clamp(row0 + below * v.rise_row, low_row, low_row + size - 1)
            continue
        block_row = row >> FINE
        block_col = col >> FINE
        while True:  # cell by cell through a block of 8 x 8
            block = s.height[row * s.cols + col]
            if block >= h:  # equal where a skipped block let the ray down onto its highest top
                hit.kind = WALL if block - h > 1e-4 else TOP
                break
            leave_col = crossing(col0, v.per_col, col, 1)
            leave_row = crossing(row0, v.per_row, row, 1)
            below = leave_col if leave_col > leave_row else leave_row
            if below < block:
                h = block
                hit.kind = TOP
                break
            if below < h:
                h = below
            if leave_col >= leave_row:
                col += next_col
            else:
                row += next_row
            if row >> FINE != block_row or col >> FINE != block_col or col >= s.cols or row >= s.rows:
                break
        if hit.kind >= 0:
            break
    if hit.kind < 0:
        # Left the map, which the door rules out but for rounding at its very border: bare ground there.
        row = clamp(row, 0, s.rows - 1)
        col = clamp(col, 0, s.cols - 1)
        h = ground_at(s, row * s.cols + col)
        hit.kind = TOP
    hit.row = row
    hit.col = col
    hit.at = <float>h
    hit.agl = <float>h - ground_at(s, row * s.cols + col)
    if hit.agl < 0:
        hit.agl = 0
    hit.at_col = <float>(col0 + h * v.rise_col)
    hit.at_row = <float>(row0 + h * v.rise_row)
    return hit


cdef inline bint sunlit(Scene* s, double col0, double row0, double h0, double run_col, double run_row) noexcept nogil:
    """Whether the sun is seen from a point, its own cell left out; run_*: cells per metre of climb to the sun."""
    cdef Py_ssize_t col = <Py_ssize_t>floor(col0)
    cdef Py_ssize_t row = <Py_ssize_t>floor(row0)
    cdef double h = h0
    cdef double leave_col, leave_row
    cdef double per_col = 1 / run_col if run_col != 0 else 0
    cdef double per_row = 1 / run_row if run_row != 0 else 0
    cdef Py_ssize_t low_row, low_col, shift, size
    cdef bint first = True
    while 0 <= col < s.cols and 0 <= row < s.rows and h < s.top:
        if first:
            shift = 0
            first = False
        elif s.coarse[(row >> COARSE) * s.coarse_cols + (col >> COARSE)] <= h:
            shift = COARSE
        elif s.fine[(row >> FINE) * s.fine_cols + (col >> FINE)] <= h:
            shift = FINE
        elif s.height[row * s.cols + col] > h:
            return False
        else:
            shift = 0
        size = 1 << shift
        low_row = (row >> shift) << shift
        low_col = (col >> shift) << shift
        # Climbs here: the boundary in the direction of travel.
        leave_col = 1e30
        leave_row = 1e30
        if run_col > 0:
            leave_col = h0 + (low_col + size - col0) * per_col
        elif run_col < 0:
            leave_col = h0 + (low_col - col0) * per_col
        if run_row > 0:
            leave_row = h0 + (low_row + size - row0) * per_row
        elif run_row < 0:
            leave_row = h0 + (low_row - row0) * per_row
        if leave_col < leave_row:
            if leave_col > h:
                h = leave_col
            col = low_col + size if run_col > 0 else low_col - 1
            row = clamp(row0 + (h - h0) * run_row, low_row, low_row + size - 1)
        elif leave_row < 1e29:
            if leave_row > h:
                h = leave_row
            row = low_row + size if run_row > 0 else low_row - 1
            col = clamp(col0 + (h - h0) * run_col, low_col, low_col + size - 1)
        else:
            return True
    return True


cdef inline void fill_scene(Scene* s, const float[:, ::1] height, const float[:, ::1] ground,
                            const float[:, ::1] fine, const float[:, ::1] coarse, float cell, float top) noexcept nogil:
    s.height = &height[0, 0]
    s.ground = &ground[0, 0] if ground.shape[0] > 0 else NULL
    s.fine = &fine[0, 0]
    s.coarse = &coarse[0, 0]
    s.rows = height.shape[0]
    s.cols = height.shape[1]
    s.fine_cols = fine.shape[1]
    s.coarse_cols = coarse.shape[1]
    s.cell = cell
    s.top = top


cdef inline void fill_view(View* v, const double[::1] camera) noexcept nogil:
    v.col_x = camera[0]
    v.col_y = camera[1]
    v.col_0 = camera[2]
    v.row_x = camera[3]
    v.row_y = camera[4]
    v.row_0 = camera[5]
    v.rise_col = camera[6]
    v.rise_row = camera[7]
    v.per_col = 1 / v.rise_col if v.rise_col != 0 else 0
    v.per_row = 1 / v.rise_row if v.rise_row != 0 else 0
