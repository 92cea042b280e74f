/* Decoding a box of a JPEG image with libjpeg-turbo; see jpeg.py. */

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

/* Fancy upsampling gives a pixel a share of the next chroma sample, which reaches so many pixels further at most. */
enum { MARGIN = 2 };

/* Images of so few columns are not given fancy upsampling. */
enum { NARROW = 4 };

struct box {
    uint32_t top, left, height, width;
};

/* How the data of an image is divided. */
struct layout {
    size_t frame;                       /* where height and width stand */
    size_t scan;                        /* where the coded blocks begin */
    uint32_t interval;                  /* groups of blocks between two restart markers */
    uint32_t group_height, group_width; /* in pixels */
};

static uint32_t two_bytes(const uint8_t *at) { return (uint32_t)at[0] << 8 | at[1]; }

/* Reads the layout of a JPEG with restart markers, Huffman codes and a single sequential scan; returns 0 for others. */
static int read_layout(const uint8_t *jpeg, size_t size, struct layout *layout) {
    uint32_t components = 0, high = 1, wide = 1;
    *layout = (struct layout){0};
    for (size_t at = 2; at + 4 <= size && jpeg[at] == 0xFF;) {
        uint32_t marker = jpeg[at + 1], length = two_bytes(jpeg + at + 2);
        const uint8_t *body = jpeg + at + 4;
        if (length < 4 || at + 2 + length > size) return 0;
        if (marker == 0xC0 || marker == 0xC1) {
            if (length < 8 || length < 8 + 3 * (components = body[5])) return 0;
            for (uint32_t i = 0; i < components; i++) {
                uint32_t sampling = body[7 + 3 * i];
                if (sampling >> 4 > wide) wide = sampling >> 4;
                if ((sampling & 15) > high) high = sampling & 15;
            }
            layout->frame = at + 5;
        } else if (marker == 0xDD) {
            layout->interval = two_bytes(body);
        } else if (marker == 0xDA) {
            layout->scan = at + 2 + length;
            layout->group_height = 8 * high;
            layout->group_width = 8 * wide;
            int plain = components > 1 || (high == 1 && wide == 1);
            return layout->frame && layout->interval && body[0] == components && plain;
        } else if (marker >= 0xC2 && marker <= 0xCF && marker != 0xC4) {
            return 0;
        }
        at += 2 + length;
    }
    return 0;
}

/* Where the marker after some coded blocks stands, or `end`. */
static const uint8_t *next_marker(const uint8_t *at, const uint8_t *end) {
    while (at < end && (at = memchr(at, 0xFF, end - at)) && at + 1 < end) {
        if (at[1] != 0x00 && at[1] != 0xFF) return at;
        at += at[1] == 0x00 ? 2 : 1;
    }
    return end;
}

/* Makes a JPEG of the restart intervals that a box needs, if rows of blocks are made of whole ones: an interval can be
 * decoded without those before it. Sets `size` and `part`, what it holds of the image; returns NULL if this cannot be.
 * The caller frees it. */
static uint8_t *cut_out(const uint8_t *jpeg, size_t *size, struct box box, struct box *part) {
    struct layout layout;
    uint32_t height = part->height, width = part->width;
    if (!read_layout(jpeg, *size, &layout)) return NULL;
    if (two_bytes(jpeg + layout.frame) != height || two_bytes(jpeg + layout.frame + 2) != width) return NULL;
    uint32_t groups = (width + layout.group_width - 1) / layout.group_width;
    uint32_t rows = (height + layout.group_height - 1) / layout.group_height;
    if (groups % layout.interval) return NULL;

    uint32_t columns = groups / layout.interval, column_width = layout.interval * layout.group_width;
    uint32_t first_row = (box.top > MARGIN ? box.top - MARGIN : 0) / layout.group_height;
    uint32_t first_column = (box.left > MARGIN ? box.left - MARGIN : 0) / column_width;
    uint32_t end_row = (box.top + box.height + MARGIN + layout.group_height - 1) / layout.group_height;
    uint32_t end_column = (box.left + box.width + MARGIN + column_width - 1) / column_width;
    if (first_column > 0 && width - first_column * column_width <= NARROW) first_column--;
    if (end_row > rows) end_row = rows;
    if (end_column > columns) end_column = columns;

    uint8_t *copy = malloc(*size + 2);
    if (!copy) return NULL;
    memcpy(copy, jpeg, layout.scan);
    uint8_t *to = copy + layout.scan;
    const uint8_t *from = jpeg + layout.scan, *end = jpeg + *size;
    uint32_t copied = 0;
    for (uint32_t i = 0; i < end_row * columns; i++) {
        const uint8_t *marker = next_marker(from, end);
        uint32_t expected = i + 1 < rows * columns ? 0xD0 + i % 8 : 0xD9;
        if (end - marker < 2 || marker[1] != expected) {
            free(copy);
            return NULL;
        }
        if (i / columns >= first_row && i % columns >= first_column && i % columns < end_column) {
            if (copied) {
                *to++ = 0xFF;
                *to++ = 0xD0 + (copied - 1) % 8;
            }
            memcpy(to, from, marker - from);
            to += marker - from;
            copied++;
        }
        from = marker + 2;
    }
    *to++ = 0xFF;
    *to++ = 0xD9;

    part->top = first_row * layout.group_height;
    part->left = first_column * column_width;
    part->height = (end_row == rows ? height : end_row * layout.group_height) - part->top;
    part->width = (end_column == columns ? width : end_column * column_width) - part->left;
    uint8_t *frame = copy + layout.frame;
    frame[0] = part->height >> 8;
    frame[1] = part->height & 255;
    frame[2] = part->width >> 8;
    frame[3] = part->width & 255;
    *size = to - copy;
    return copy;
}

struct errors {
    struct jpeg_error_mgr base;
    jmp_buf escape;
};

static void give_up(j_common_ptr info) { longjmp(((struct errors *)info->err)->escape, 1); }

/* A level below 0 means that the data is corrupt and that libjpeg would go on with pixels of its own invention. */
static void on_message(j_common_ptr info, int level) {
    if (level < 0) give_up(info);
}

/* Whether the scans of a progressive image, all of them read, leave a coefficient unknown or known in part. */
static int misses_scans(const struct jpeg_decompress_struct *info) {
    if (!info->progressive_mode) return 0;
    for (int component = 0; component < info->num_components; component++)
        for (int i = 0; i < DCTSIZE2; i++)
            if (info->coef_bits[component][i] != 0) return 1;
    return 0;
}

/* Decodes a box of a JPEG of height x width into rows of `stride` bytes; `pixels` is the address of the whole image's
 * first pixel. Returns 0 or, if the data is not as it should be, 1. */
static int decode(const uint8_t *jpeg, size_t size, uint32_t height, uint32_t width, struct box box, uint8_t *pixels,
                  size_t stride) {
    struct jpeg_decompress_struct info;
    struct errors errors;
    info.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = give_up;
    errors.base.emit_message = on_message;
    if (setjmp(errors.escape)) {
        jpeg_destroy_decompress(&info);
        return 1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, jpeg, size);
    jpeg_read_header(&info, TRUE);
    if (info.image_height != height || info.image_width != width) give_up((j_common_ptr)&info);
    info.out_color_space = JCS_RGB;
    info.dct_method = JDCT_ISLOW;
    jpeg_start_decompress(&info);
    if (misses_scans(&info)) give_up((j_common_ptr)&info); /* libjpeg would smooth, each version in its own way */

    JDIMENSION first = box.left > MARGIN ? box.left - MARGIN : 0;
    JDIMENSION end = width - box.left - box.width > MARGIN ? box.left + box.width + MARGIN : width;
    JDIMENSION columns = end - first;
    if (columns < width) jpeg_crop_scanline(&info, &first, &columns); /* widens it to whole blocks on the left */
    if (box.top > 0) jpeg_skip_scanlines(&info, box.top);
    while (info.output_scanline < box.top + box.height) {
        JSAMPROW row = pixels + info.output_scanline * stride + 3 * first;
        jpeg_read_scanlines(&info, &row, 1);
    }
    if (info.output_scanline == height) jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    return 0;
}

/* Decodes a box that lies inside a JPEG of height x width to its place in `pixels`, RGB rows of the whole image.
 * Columns beside the box may be written too. Returns 0, or 1 if the data that the box needs is damaged or lacking, is
 * not RGB, YCbCr or gray, or is of another size; then `pixels` holds anything. */
int automix_decode_box(const uint8_t *jpeg, uint64_t size, uint32_t height, uint32_t width, uint32_t top, uint32_t left,
                       uint32_t box_height, uint32_t box_width, uint8_t *pixels) {
    struct box box = {top, left, box_height, box_width}, part = {0, 0, height, width};
    size_t stride = 3 * (size_t)width, part_size = size;
    uint8_t *copy = cut_out(jpeg, &part_size, box, &part);
    box.top -= part.top;
    box.left -= part.left;
    pixels += part.top * stride + 3 * part.left;
    int status = decode(copy ? copy : jpeg, part_size, part.height, part.width, box, pixels, stride);
    free(copy);
    return status;
}
