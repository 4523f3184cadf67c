"""The colours of the synthetic renderer: what each sight line of _rays.pxd meets, lit by sun and sky.

Material, texture, windows, cast shadow; edges are averaged over three rays. Doors and twin are in render.py. No
Python object is touched inside the loops, so threads may run them side by side.
"""

from libc.math cimport fabsf, sqrtf
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc

from geopose_dist.kernels._rays cimport TOP, Hit, Scene, View, begin, fill_scene, fill_view, ground_at, look

cdef enum:
    PATCH_PX = 16  # pixels of a square whose rays begin together

cdef enum:
    SUNNY = 1
    FACADE = 2
    LEAFY = 4

# Columns of the object table; render.py names them for Python.
cdef enum:
    RED = 0
    WALL_RED = 3
    COSINE = 6
    SINE = 7
    FLOOR = 8
    BAY = 9
    GRAIN = 10
    PATCH = 11
    MATERIAL = 12
    STYLE = 13
    GLASS = 14
    RIB = 15

cdef struct Light:
    float sun_x  # unit vector to the sun
    float sun_y
    float sun_z
    float soft      # metres of height over which a shadow's edge fades
    float tall      # metres of a wall that a pixel shows
    float wide      # metres of ground along it
    float view_x    # unit vector over the cells towards the viewer
    float view_y
    float sun[3]
    float sky[3]

cdef inline uint32_t mix(uint32_t a) noexcept nogil:
    """A 32-bit hash (finaliser of the murmur family), for details that need no generator."""
    a ^= a >> 16
    a *= <uint32_t>0x85EBCA6B
    a ^= a >> 13
    a *= <uint32_t>0xC2B2AE35
    a ^= a >> 16
    return a


cdef inline float unit(uint32_t a) noexcept nogil:
    return <float>(mix(a) >> 8) * <float>(1.0 / 16777216.0)


cdef inline float cell_height(Scene* s, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    if row < 0 or col < 0 or row >= s.rows or col >= s.cols:
        return 0
    return s.height[row * s.cols + col]


cdef inline float slope(float before, float here, float after, float limit, float per_m) noexcept nogil:
    """Rise per metre; a side that drops like a wall (by more than `limit`) is left out."""
    cdef float a = here - before
    cdef float b = after - here
    cdef bint left = -limit <= a <= limit
    cdef bint right = -limit <= b <= limit
    cdef float sum = (a if left else 0) + (b if right else 0)
    return sum * per_m * (<float>0.5 if left and right else <float>1)


cdef inline const float* grain(Scene* s, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
    """The fine and the coarse texture at a cell."""
    return s.noise + 2 * ((row & s.noise_mask) * (s.noise_mask + 1) + (col & s.noise_mask))


cdef inline float sun_share(Scene* s, Light* light, Py_ssize_t row, Py_ssize_t col, float h) noexcept nogil:
    """Share of the sun's disc that shows from height h over a cell."""
    cdef const float* pair
    cdef float share
    if row < 0 or col < 0 or row >= s.rows or col >= s.cols:
        return 1
    pair = s.shade + row * s.shade_row + col * s.shade_col
    if h >= pair[0] + light.soft:
        return 1
    share = (h - pair[1]) / (pair[0] - pair[1] + light.soft)
    return share if share > 0 else 0


cdef inline float covered(float at, float low, float high, float width) noexcept nogil:
    """Share of [at - width / 2, at + width / 2] that lies in [low, high] or a whole number beside it; width <= 1."""
    cdef float first = at - <float>0.5 * width
    cdef float last = at + <float>0.5 * width
    cdef float share = 0
    cdef float part
    part = (last if last < high else high) - (first if first > low else low)
    if part > 0:
        share = part
    part = (last if last < high + 1 else high + 1) - (first if first > low + 1 else low + 1)
    if part > 0:
        share += part
    part = (last if last < high - 1 else high - 1) - (first if first > low - 1 else low - 1)
    if part > 0:
        share += part
    return share / width


cdef inline bint leaves(Scene* s, Light* light, Hit* hit, float nx, float ny) noexcept nogil:
    """Whether the way out of a wall along (nx, ny) is short: from three cells behind what is seen."""
    cdef float col = hit.at_col - 3 * light.view_x + <float>4.2 * nx
    cdef float row = hit.at_row - 3 * light.view_y + <float>4.2 * ny
    return cell_height(s, <Py_ssize_t>row, <Py_ssize_t>col) < hit.at


cdef int shade(Scene* s, Light* light, Hit* hit, float* rgb) noexcept nogil:
    """Linear radiance of what a ray met: material, texture, sun with cast shadow, sky light.

    Returns SUNNY if the sun shines there, plus FACADE if it is the wall of a building, or LEAFY.
    """
    cdef Py_ssize_t cell = hit.row * s.cols + hit.col
    cdef int32_t thing = s.ids[cell]
    cdef const float* o = s.objects + 16 * thing
    cdef const float* gain = s.gains + 3 * <int>o[MATERIAL]
    cdef const float* near = s.near + 2 * ((hit.row >> 2) * s.near_cols + (hit.col >> 2))
    cdef const float* pair
    cdef float nx, ny, nz, facing, open_sky, texture, along, part, storey, dim, climb, glass
    cdef bint leafy = 2 <= <int>o[MATERIAL] <= 3
    cdef int k
    cdef uint32_t code
    cdef float here = s.height[cell]
    cdef float lit = 0
    open_sky = near[0] - hit.at
    open_sky = 1 if open_sky < 0 else 1 / (1 + <float>0.09 * open_sky)
    code = mix(<uint32_t>thing)
    if hit.kind == TOP or here - hit.at < <float>0.6 or leafy:
        dim = (4 if leafy else <float>1.4) * s.cell  # a crown keeps its steep sides
        part = 1 / s.cell
        if 0 < hit.row < s.rows - 1 and 0 < hit.col < s.cols - 1:
            nx = -slope(s.height[cell - 1], here, s.height[cell + 1], dim, part)
            ny = -slope(s.height[cell - s.cols], here, s.height[cell + s.cols], dim, part)
        else:
            nx = 0
            ny = 0
        nz = 1 / sqrtf(1 + nx * nx + ny * ny)
        facing = (nx * light.sun_x + ny * light.sun_y + light.sun_z) * nz
        if leafy:
            facing = <float>0.35 * light.sun_z + <float>0.65 * facing  # leaves let light through
        if facing > 0:
            lit = facing * sun_share(s, light, hit.row, hit.col, here + <float>0.3)
        pair = grain(s, hit.row + (code & 255), hit.col + ((code >> 8) & 255))
        texture = 1 + o[GRAIN] * pair[0] + o[PATCH] * (<float>0.45 * pair[1] + <float>0.7 * near[1])
        if o[RIB] > 0:  # courses of tiles, seams of sheet metal, rows of stalls
            along = (hit.at_col * o[SINE] - hit.at_row * o[COSINE]) * s.cell / o[RIB]
            along = along - <Py_ssize_t>along + (1 if along < 0 else 0)
            texture *= <float>0.90 + <float>0.2 * along
        if leafy and here - hit.at > <float>0.6:  # seen from the side, a crown darkens downwards
            dim = 1 - <float>0.09 * (here - hit.at)
            texture *= dim if dim > <float>0.45 else <float>0.45
        open_sky *= <float>0.6 + <float>0.4 * (nz if nz > <float>0.5 else <float>0.5)
        if texture < <float>0.25:
            texture = <float>0.25
        for k in range(3):
            rgb[k] = o[RED + k] * gain[k] * texture * (lit * light.sun[k] + open_sky * light.sky[k])
        if <int>o[MATERIAL] == 1 or <int>o[MATERIAL] == 6:  # lawns and soil are greener here, drier there
            dim = near[1] if near[1] < <float>1.6 else <float>1.6
            dim = dim if dim > <float>-1.6 else <float>-1.6
            rgb[0] *= 1 + <float>0.09 * dim
            rgb[1] *= 1 + <float>0.03 * dim
            rgb[2] *= 1 + <float>0.02 * dim
        return (SUNNY if lit > <float>0.5 * facing else 0) + (LEAFY if leafy else 0)
    # A wall. Its plane follows the building's own axes: of the two that face the viewer, the one that is near. Cells
    # make steps of a turned wall, so it is looked for from inside.
    nx = o[COSINE]
    ny = o[SINE]
    along = nx * light.view_x + ny * light.view_y
    climb = ny * light.view_x - nx * light.view_y  # the other axis is (ny, -nx)
    part = 1 if along > 0 else -1
    dim = 1 if climb > 0 else -1
    if not leaves(s, light, hit, part * nx, part * ny) or (
            fabsf(climb) > fabsf(along) and leaves(s, light, hit, dim * ny, -dim * nx)):
        facing = nx
        nx = dim * ny
        ny = -dim * facing
    else:
        nx = part * nx
        ny = part * ny
    facing = nx * light.sun_x + ny * light.sun_y
    if facing > 0:
        # Far enough out that the steps of a turned wall, a cell deep, do not shade the wall itself.
        lit = facing * sun_share(s, light, <Py_ssize_t>(hit.at_row + <float>2.4 * ny),
                                 <Py_ssize_t>(hit.at_col + <float>2.4 * nx), hit.at + <float>0.1)
    along = (-hit.at_col * ny + hit.at_row * nx) * s.cell / o[BAY] + 40000
    storey = hit.agl / o[FLOOR]
    code = mix(<uint32_t>thing * 7919 + <uint32_t>along * 31 + <uint32_t>storey)
    part = along - <Py_ssize_t>along  # the 40000 keeps it positive
    climb = storey - <Py_ssize_t>storey
    dim = light.tall / o[FLOOR]
    dim = dim if dim < 1 else 1
    along = light.wide / o[BAY]
    along = along if along < 1 else 1
    glass = 0  # the share of glass in what the pixel shows
    if o[STYLE] == 1:    # punched windows
        glass = covered(part, 0.22, 0.78, along) * covered(climb, 0.3, 0.85, dim)
    elif o[STYLE] == 2:  # ribbon windows
        glass = covered(climb, 0.35, 0.85, dim)
    elif o[STYLE] == 3:  # curtain wall
        glass = covered(part, 0.12, 1, along) * covered(climb, 0.2, 1, dim)
    elif o[STYLE] == 4 and (code & 3) == 0:  # a few doors and windows
        glass = covered(part, 0.25, 0.75, along) * covered(climb, 0.25, 0.75, dim)
    texture = 1 + <float>0.10 * grain(s, <Py_ssize_t>(hit.at * 4), <Py_ssize_t>(hit.at_row + hit.at_col))[0]
    # Near the ground, walls see less sky and more street.
    open_sky = open_sky * (<float>0.5 + <float>0.2 * (hit.agl / (hit.agl + 8)))
    for k in range(3):
        # Glass shows the sky and a little sun, its tint from pane to pane its own.
        dim = o[GLASS] * (<float>0.20 + <float>0.05 * k + <float>0.12 * unit(code))
        climb = dim * (<float>0.25 * lit * light.sun[k] + <float>2.2 * open_sky * light.sky[k])
        dim = <float>0.06 * light.sun_z  # light from the street
        part = o[WALL_RED + k] * texture * ((lit + dim) * light.sun[k] + open_sky * light.sky[k])
        rgb[k] = part + glass * (climb - part)
    return FACADE + (SUNNY if lit > <float>0.5 * facing else 0)


cdef inline bint differ(int here, int there, int things, float climb) noexcept nogil:
    """Whether an edge worth more rays runs between two pixels; leaves against leaves are rough anyway."""
    if here & there & LEAFY:
        return False
    return things != 0 or fabsf(climb) > 1 or (here ^ there) & FACADE


cdef void fill_look(Scene* s, Light* light, const int32_t[:, ::1] ids, const float[:, ::1] objects,
                    const float[:, ::1] gains, const float[:, :, ::1] near, const float[:, :, ::1] noise,
                    const float[::1] shade_map,
                    Py_ssize_t shade_row, Py_ssize_t shade_col, const float[::1] numbers) noexcept nogil:
    cdef int k
    s.ids = &ids[0, 0]
    s.objects = &objects[0, 0]
    s.gains = &gains[0, 0]
    s.near = &near[0, 0, 0]
    s.near_cols = near.shape[1]
    s.noise = &noise[0, 0, 0]
    s.noise_mask = noise.shape[0] - 1
    s.shade = &shade_map[0]
    s.shade_row = shade_row
    s.shade_col = shade_col
    light.sun_x = numbers[0]
    light.sun_y = numbers[1]
    light.sun_z = numbers[2]
    light.soft = numbers[3]
    light.tall = numbers[4]
    light.wide = numbers[5]
    for k in range(3):
        light.sun[k] = numbers[6 + k]
        light.sky[k] = numbers[9 + k]
    light.view_x = numbers[12]
    light.view_y = numbers[13]


def render(const float[:, ::1] height, const float[:, ::1] ground, const float[:, ::1] fine,
           const float[:, ::1] coarse, float top, float cell,
           const int32_t[:, ::1] ids, const float[:, ::1] objects, const float[:, ::1] gains,
           const float[:, :, ::1] near, const float[:, :, ::1] noise, const float[::1] shade_map,
           Py_ssize_t shade_row, Py_ssize_t shade_col,
           const double[::1] camera, const float[::1] numbers,
           float[:, :, ::1] rgb, float[:, ::1] agl, float[:, ::1] row, float[:, ::1] col,
           int32_t[:, ::1] seen, uint8_t[:, ::1] kind, uint8_t[:, ::1] lit):
    """As `trace`, with the linear radiance, the object seen, and 1 in `lit` where the sun shines on it.

    Edges of things are averaged over three rays; shadows and windows have soft edges of their own.
    """
    cdef Scene s
    cdef View v
    cdef Light light
    cdef Hit hit
    cdef Py_ssize_t y, x, k, j, down, over, top_y, left, end_y, end_x
    cdef Py_ssize_t rows = agl.shape[0]
    cdef Py_ssize_t cols = agl.shape[1]
    cdef Py_ssize_t starts_cols = (cols + PATCH_PX - 1) // PATCH_PX
    cdef float part[3]
    cdef float total[3]
    cdef bint edge
    cdef int here, thing
    cdef float h
    cdef double offset, start
    cdef double* starts = <double*>malloc(starts_cols * ((rows + PATCH_PX - 1) // PATCH_PX) * sizeof(double))
    if starts == NULL:
        raise MemoryError
    with nogil:
        fill_scene(&s, height, ground, fine, coarse, cell, top)
        fill_view(&v, camera)
        fill_look(&s, &light, ids, objects, gains, near, noise, shade_map, shade_row, shade_col, numbers)
        for down in range((rows + PATCH_PX - 1) // PATCH_PX):
            top_y = PATCH_PX * down
            end_y = min(top_y + PATCH_PX, rows)
            for over in range((cols + PATCH_PX - 1) // PATCH_PX):
                left = PATCH_PX * over
                end_x = min(left + PATCH_PX, cols)
                start = begin(&s, &v, left - 0.5, top_y - 0.5, end_x - 0.5, end_y - 0.5)
                starts[(top_y // PATCH_PX) * starts_cols + left // PATCH_PX] = start
                for y in range(top_y, end_y):
                    for x in range(left, end_x):
                        hit = look(&s, &v, <double>x, <double>y, start)
                        agl[y, x] = hit.agl
                        row[y, x] = hit.at_row
                        col[y, x] = hit.at_col
                        kind[y, x] = hit.kind
                        seen[y, x] = s.ids[hit.row * s.cols + hit.col]
                        lit[y, x] = shade(&s, &light, &hit, &rgb[y, x, 0])
        for y in range(rows):
            for x in range(cols):
                here = lit[y, x]
                thing = seen[y, x]
                h = agl[y, x]
                edge = x > 0 and differ(here, lit[y, x - 1], thing - seen[y, x - 1], h - agl[y, x - 1])
                edge |= y > 0 and differ(here, lit[y - 1, x], thing - seen[y - 1, x], h - agl[y - 1, x])
                edge |= x + 1 < cols and differ(here, lit[y, x + 1], thing - seen[y, x + 1], 0)
                edge |= y + 1 < rows and differ(here, lit[y + 1, x], thing - seen[y + 1, x], 0)
                if not edge:
                    continue
                # With the middle, three rays; the diagonal alternates, so that neighbours fill each other's gaps.
                for k in range(3):
                    total[k] = rgb[y, x, k]
                start = starts[(y // PATCH_PX) * starts_cols + x // PATCH_PX]
                for j in range(2):
                    offset = 0.3 if j else -0.3
                    hit = look(&s, &v, x + offset, y + (offset if (x + y) & 1 else -offset), start)
                    shade(&s, &light, &hit, &part[0])
                    for k in range(3):
                        total[k] += part[k]
                for k in range(3):
                    rgb[y, x, k] = total[k] * <float>(1.0 / 3.0)
        for y in range(rows):
            for x in range(cols):
                lit[y, x] &= SUNNY
        free(starts)


def paint(const float[:, ::1] height, const float[:, ::1] ground, float cell,
          const int32_t[:, ::1] ids, const float[:, ::1] objects, const float[:, ::1] gains,
          const float[:, :, ::1] near, const float[:, :, ::1] noise, const float[::1] shade_map,
          Py_ssize_t shade_row, Py_ssize_t shade_col,
          const float[::1] numbers, const float[:, ::1] row, const float[:, ::1] col,
          float[:, :, ::1] rgb, float[:, ::1] agl):
    """The radiance and height of the tops of the cells at (row, col), as if nothing stood before them."""
    cdef Scene s
    cdef Light light
    cdef Hit hit
    cdef Py_ssize_t y, x
    with nogil:
        fill_scene(&s, height, ground, height, height, cell, 0)
        fill_look(&s, &light, ids, objects, gains, near, noise, shade_map, shade_row, shade_col, numbers)
        for y in range(agl.shape[0]):
            for x in range(agl.shape[1]):
                hit.row = <Py_ssize_t>row[y, x]
                hit.col = <Py_ssize_t>col[y, x]
                hit.at_row = row[y, x]
                hit.at_col = col[y, x]
                hit.kind = TOP
                hit.at = s.height[hit.row * s.cols + hit.col]
                hit.agl = hit.at - ground_at(&s, hit.row * s.cols + hit.col)
                agl[y, x] = hit.agl
                shade(&s, &light, &hit, &rgb[y, x, 0])
