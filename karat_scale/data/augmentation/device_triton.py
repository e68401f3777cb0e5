"""Triton kernels for all images of a batch: their crops resized, a turn of augmentation, and the model's input.

In a turn, a program reads the Kind of its image and does only that operation, as `device_augment` does it. Triton is
imported here, so this module is imported at the first launch.
"""

import triton
import triton.language as tl

from karat_scale.data.augmentation.device_program import COLUMNS, VIEW_BOX, VIEW_COLUMNS, Kind

STEP = tl.constexpr(COLUMNS)
AFFINE, ERASE = tl.constexpr(int(Kind.AFFINE)), tl.constexpr(int(Kind.ERASE))
COLOR, DESATURATE = tl.constexpr(int(Kind.COLOR)), tl.constexpr(int(Kind.DESATURATE))
SHARPNESS = tl.constexpr(int(Kind.SHARPNESS))
BRIGHTNESS, CONTRAST = tl.constexpr(int(Kind.BRIGHTNESS)), tl.constexpr(int(Kind.CONTRAST))
POSTERIZE, INVERT = tl.constexpr(int(Kind.POSTERIZE)), tl.constexpr(int(Kind.INVERT))
SOLARIZE, SOLARIZE_ADD = tl.constexpr(int(Kind.SOLARIZE)), tl.constexpr(int(Kind.SOLARIZE_ADD))
AUTO_CONTRAST, EQUALIZE = tl.constexpr(int(Kind.AUTO_CONTRAST)), tl.constexpr(int(Kind.EQUALIZE))
LEVELS = tl.constexpr(256)
VIEW_STEP, BOX = tl.constexpr(VIEW_COLUMNS), tl.constexpr(VIEW_BOX)
MIXUP, CUTMIX = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def tables_kernel(images, program, tables, pixels, BLOCK: tl.constexpr):
    """Write tables of levels, uint8 [b, 3, 256], for images whose operation is a table. A program does one table."""
    image, channel = tl.program_id(0) // 3, tl.program_id(0) % 3
    kind = tl.load(program + image * STEP).to(tl.int32)
    if kind >= BRIGHTNESS:
        argument = tl.load(program + image * STEP + 1)
        whole = argument.to(tl.int32)
        factor = argument.to(tl.float32)
        first = images + image.to(tl.int64) * 3 * pixels
        levels = tl.arange(0, LEVELS)
        table = LEVELS - 1 - levels
        if kind == BRIGHTNESS:
            table = _blended(levels * 0, levels, factor)
        elif kind == CONTRAST:
            table = _blended(levels * 0 + _mean_grey(first, pixels, BLOCK), levels, factor)
        elif kind == POSTERIZE:
            cut = 8 - tl.minimum(tl.maximum(whole, 0), 8)
            table = (levels >> cut) << cut
        elif kind == SOLARIZE:
            table = tl.where(levels < whole, levels, table)
        elif kind == SOLARIZE_ADD:
            table = tl.where(levels < 128, tl.minimum(levels + whole, LEVELS - 1), levels)
        elif kind >= AUTO_CONTRAST:
            counts = _counts(first + channel * pixels, pixels, BLOCK)
            if kind == AUTO_CONTRAST:
                table = _stretched(levels, counts)
            else:
                table = _equalized(levels, counts, pixels)
        tl.store(tables + tl.program_id(0) * LEVELS + levels, table.to(tl.uint8))


@triton.jit
def turn_kernel(
    images,
    program,
    tables,
    result,
    height,
    width,
    fill_red,
    fill_green,
    fill_blue,
    mean_red,
    mean_green,
    mean_blue,
    std_red,
    std_green,
    std_blue,
    CUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do one turn on uint8 [b, 3, height, width]. A program does BLOCK pixels of an image, all channels.

    mean, std: those of the noise in erased boxes, in levels.
    """
    image = tl.program_id(1)
    pixels = height * width
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    row, column = at // width, at % width
    step = program + image * STEP
    kind = tl.load(step).to(tl.int32)
    source, target = images + image.to(tl.int64) * 3 * pixels, result + image.to(tl.int64) * 3 * pixels
    red, green, blue = _colours(source, at, pixels, inside)
    argument = tl.load(step + 1)
    if kind == AFFINE:
        x, y = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
        across = argument * x + tl.load(step + 2) * y + tl.load(step + 3)
        down = tl.load(step + 4) * x + tl.load(step + 5) * y + tl.load(step + 6)
        outside = (across < 0) | (across >= width) | (down < 0) | (down >= height)
        red = tl.where(outside, fill_red, _sampled(source, across, down, height, width, inside, CUBIC))
        green = tl.where(outside, fill_green, _sampled(source + pixels, across, down, height, width, inside, CUBIC))
        blue = tl.where(outside, fill_blue, _sampled(source + 2 * pixels, across, down, height, width, inside, CUBIC))
    elif kind == ERASE:
        left, top = argument.to(tl.int32), tl.load(step + 2).to(tl.int32)
        right, bottom = left + tl.load(step + 3).to(tl.int32), top + tl.load(step + 4).to(tl.int32)
        box = (column >= left) & (column < right) & (row >= top) & (row < bottom)
        seed = tl.load(step + 5).to(tl.int64)
        red = tl.where(box, _cut(tl.randn(seed, at) * std_red + mean_red), red)
        green = tl.where(box, _cut(tl.randn(seed, at + pixels) * std_green + mean_green), green)
        blue = tl.where(box, _cut(tl.randn(seed, at + 2 * pixels) * std_blue + mean_blue), blue)
    elif (kind == COLOR) | (kind == DESATURATE):
        grey, factor = _grey(red, green, blue), argument.to(tl.float32)
        factor = tl.where(kind == COLOR, factor, tl.minimum(tl.maximum(1 - factor, 0.0), 1.0))
        red, green, blue = _blended(grey, red, factor), _blended(grey, green, factor), _blended(grey, blue, factor)
    elif kind == SHARPNESS:
        factor = argument.to(tl.float32)
        within = inside & (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
        red = _blended(_smooth(source, red, at, width, within), red, factor)
        green = _blended(_smooth(source + pixels, green, at, width, within), green, factor)
        blue = _blended(_smooth(source + 2 * pixels, blue, at, width, within), blue, factor)
    elif kind >= BRIGHTNESS:
        table = tables + image * 3 * LEVELS
        red = tl.load(table + red).to(tl.int32)
        green = tl.load(table + LEVELS + green).to(tl.int32)
        blue = tl.load(table + 2 * LEVELS + blue).to(tl.int32)
    tl.store(target + at, red.to(tl.uint8), mask=inside)
    tl.store(target + pixels + at, green.to(tl.uint8), mask=inside)
    tl.store(target + 2 * pixels + at, blue.to(tl.uint8), mask=inside)


@triton.jit
def _colours(source, at, pixels, inside):
    red = tl.load(source + at, mask=inside, other=0).to(tl.int32)
    green = tl.load(source + pixels + at, mask=inside, other=0).to(tl.int32)
    blue = tl.load(source + 2 * pixels + at, mask=inside, other=0).to(tl.int32)
    return red, green, blue


@triton.jit
def _cut(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _blended(plain, value, factor):
    # ImageEnhance: from what lacks a property to the image and beyond.
    start = plain.to(tl.float32)
    return _cut(start + factor * (value.to(tl.float32) - start))


@triton.jit
def _grey(red, green, blue):
    # Pillow's luma.
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _mean_grey(source, pixels, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        red, green, blue = _colours(source, at, pixels, at < pixels)
        sums += _grey(red, green, blue)  # 0 beyond the image
    return ((2 * tl.sum(sums) + pixels) // (2 * pixels)).to(tl.int32)


@triton.jit
def _counts(plane, pixels, BLOCK: tl.constexpr):
    counts = tl.zeros([LEVELS], tl.int32)
    for start in range(0, pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts += tl.histogram(tl.load(plane + at, mask=at < pixels, other=0).to(tl.int32), LEVELS)
    beyond = (pixels + BLOCK - 1) // BLOCK * BLOCK - pixels
    return counts - tl.where(tl.arange(0, LEVELS) == 0, beyond, 0)


@triton.jit
def _stretched(levels, counts):
    low = tl.min(tl.where(counts > 0, levels, LEVELS - 1))
    high = tl.max(tl.where(counts > 0, levels, 0))
    scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
    stretched = levels.to(tl.float64) * scale - low.to(tl.float64) * scale
    stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
    return tl.where(high > low, stretched, levels)


@triton.jit
def _equalized(levels, counts, pixels):
    highest = tl.max(tl.where(counts > 0, levels, 0))
    step = (pixels - tl.sum(tl.where(levels == highest, counts, 0))) // (LEVELS - 1)
    before = tl.cumsum(counts) - counts
    spread = tl.minimum((step // 2 + before) // tl.maximum(step, 1), LEVELS - 1)
    return tl.where(step > 0, spread, levels)


@triton.jit
def _smooth(plane, value, at, width, within):
    # ImageFilter.SMOOTH: a mean of 3 x 3 with the centre five times; the border stays.
    total = 5 * value
    for number in tl.static_range(9):
        if number != 4:
            neighbour = at + (number // 3 - 1) * width + (number % 3 - 1)
            total += tl.load(plane + neighbour, mask=within, other=0).to(tl.int32)
    return tl.where(within, (2 * total + 13) // 26, value)


@triton.jit
def _sampled(plane, across, down, height, width, inside, CUBIC: tl.constexpr):
    # Image.transform between pixels: in Pillow's order, in which a flat colour stays what it is, and cut off as there.
    left, top = tl.floor(across - 0.5), tl.floor(down - 0.5)
    x, y = (across - 0.5 - left).to(tl.float32), (down - 0.5 - top).to(tl.float32)
    column, row = left.to(tl.int32), top.to(tl.int32)
    second = _line(plane, row, column, x, height, width, inside, CUBIC)
    third = _line(plane, row + 1, column, x, height, width, inside, CUBIC)
    if CUBIC:
        first = _line(plane, row - 1, column, x, height, width, inside, CUBIC)
        fourth = _line(plane, row + 2, column, x, height, width, inside, CUBIC)
        return _cut(_cubic(first, second, third, fourth, y))
    else:
        return _cut(second + y * (third - second))


@triton.jit
def _line(plane, row, column, x, height, width, inside, CUBIC: tl.constexpr):
    line = plane + tl.minimum(tl.maximum(row, 0), height - 1) * width
    second = _pixel(line, column, width, inside)
    third = _pixel(line, column + 1, width, inside)
    if CUBIC:
        first = _pixel(line, column - 1, width, inside)
        return _cubic(first, second, third, _pixel(line, column + 2, width, inside), x)
    else:
        return second + x * (third - second)


@triton.jit
def _pixel(line, column, width, inside):
    return tl.load(line + tl.minimum(tl.maximum(column, 0), width - 1), mask=inside, other=0).to(tl.float32)


@triton.jit
def _cubic(one, two, three, four, part):
    # Pillow's cubic is Keys' with -1.
    return two + part * (three - one + part * (2 * (one - two) + three - four + part * (two - one + four - three)))


@triton.jit
def views_kernel(table, result, size, CUBIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the views of `table` (see `pack_views`), uint8 [b, 3, size, size]. A program does ROWS x WIDTH of a view.

    It resizes each source row that it needs horizontally, rounds it, and adds it to the result rows that it is part of,
    as `resize_on_device` does.
    """
    image = tl.program_id(2).to(tl.int64)
    view = table + image * VIEW_STEP
    plane = tl.load(view).to(tl.pointer_type(tl.uint8))
    next_plane, next_row, next_column = tl.load(view + 1), tl.load(view + 2), tl.load(view + 3).to(tl.int32)
    left, top = tl.load(view + 4).to(tl.int32), tl.load(view + 5).to(tl.int32)
    right, bottom = tl.load(view + 6).to(tl.int32), tl.load(view + 7).to(tl.int32)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at_column, at_row = tl.minimum(column, size - 1), tl.minimum(row, size - 1)
    at_column = tl.where(tl.load(view + BOX - 1) != 0, size - 1 - at_column, at_column)
    first_column, across, step_across, taps = _taps(view + BOX, at_column, size, CUBIC)
    first_row, down, step_down, reach = _taps(view + BOX + 1, at_row, size, CUBIC)
    across_sum = tl.zeros([WIDTH], tl.float32)
    for tap in range(0, taps):
        inside = (first_column + tap >= left) & (first_column + tap < right)
        across_sum += tl.where(inside, _filter(across + tap * step_across, CUBIC), 0.0)
    down_sum = tl.zeros([ROWS, 1], tl.float32)
    red = tl.zeros([ROWS, WIDTH], tl.float32)
    green, blue = red, red
    for line in range(tl.maximum(tl.min(first_row), top), tl.minimum(tl.max(first_row) + reach, bottom)):
        red_line = tl.zeros([WIDTH], tl.float32)
        green_line, blue_line = red_line, red_line
        for tap in range(0, taps):
            pixel = first_column + tap
            inside = (pixel >= left) & (pixel < right)
            weight = _filter(across + tap * step_across, CUBIC)
            place = plane + next_row * line + next_column * pixel
            red_line += weight * tl.load(place, mask=inside, other=0).to(tl.float32)
            green_line += weight * tl.load(place + next_plane, mask=inside, other=0).to(tl.float32)
            blue_line += weight * tl.load(place + 2 * next_plane, mask=inside, other=0).to(tl.float32)
        weight = _filter(down + (line - first_row) * step_down, CUBIC)[:, None]
        down_sum += weight
        red += weight * _nearest_level(red_line / across_sum)[None, :]
        green += weight * _nearest_level(green_line / across_sum)[None, :]
        blue += weight * _nearest_level(blue_line / across_sum)[None, :]
    target = result + image * 3 * size * size + row[:, None] * size + column[None, :]
    shown = (row[:, None] < size) & (column[None, :] < size)
    tl.store(target, _nearest_level(red / down_sum).to(tl.uint8), mask=shown)
    tl.store(target + size * size, _nearest_level(green / down_sum).to(tl.uint8), mask=shown)
    tl.store(target + 2 * size * size, _nearest_level(blue / down_sum).to(tl.uint8), mask=shown)


@triton.jit
def _taps(ends, at, size, CUBIC: tl.constexpr):
    # Along one axis of the box between *ends and ends[2]: the first pixel that the filter reads for result `at`, its
    # distance from the filter's middle, the distance of two pixels, and how many it reads. Distances are in units of
    # the larger pixels.
    start, stop = tl.load(ends).to(tl.float64, bitcast=True), tl.load(ends + 2).to(tl.float64, bitcast=True)
    scale = (stop - start) / size
    stretch = tl.maximum(scale, 1.0)
    if CUBIC:
        reach = 2 * stretch
    else:
        reach = stretch
    middle = start + (at.to(tl.float64) + 0.5) * scale
    first = tl.floor(middle - reach + 0.5)
    distance = ((first + 0.5 - middle) / stretch).to(tl.float32)
    return first.to(tl.int32), distance, (1 / stretch).to(tl.float32), tl.ceil(2 * reach).to(tl.int32) + 1


@triton.jit
def _filter(distance, CUBIC: tl.constexpr):
    # Keys' cubic with -0.5, or a triangle: Pillow's for a resize.
    distance = tl.abs(distance)
    if CUBIC:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        return tl.where(distance < 1, near, tl.where(distance < 2, far, 0.0))
    else:
        return tl.maximum(1 - distance, 0.0)


@triton.jit
def _nearest_level(value):
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0)


@triton.jit(do_not_specialize=["top", "bottom", "left", "right"])
def input_kernel(
    images,
    result,
    pixels,
    width,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    own,
    other,
    top,
    bottom,
    left,
    right,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn uint8 [b, 3, H, W] into the model's input: scaled, shifted, mixed with the neighbour, in the result's type.

    The operations and their order are those of `Normalize` and `mixed` in float32. A program does BLOCK pixels of one
    channel.
    """
    image, channel = tl.program_id(0) // 3, tl.program_id(0) % 3
    scale = tl.where(channel == 0, scale_red, tl.where(channel == 1, scale_green, scale_blue))
    shift = tl.where(channel == 0, shift_red, tl.where(channel == 1, shift_green, shift_blue))
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    level = tl.load(images + (image * 3 + channel).to(tl.int64) * pixels + at, mask=inside, other=0)
    partner = images + ((image ^ 1) * 3 + channel).to(tl.int64) * pixels + at
    if MIX == CUTMIX:
        row, column = at // width, at % width
        box = inside & (row >= top) & (row < bottom) & (column >= left) & (column < right)
        level = tl.where(box, tl.load(partner, mask=box, other=0), level)
    value = level.to(tl.float32) * scale + shift
    if MIX == MIXUP:
        value = value * own + (tl.load(partner, mask=inside, other=0).to(tl.float32) * scale + shift) * other
    place = result + (image * 3 + channel).to(tl.int64) * pixels + at
    tl.store(place, value.to(result.dtype.element_ty), mask=inside)
