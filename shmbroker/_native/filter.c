/* filter.c: see filter.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "filter.h"

#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "codes.h"

enum kind { NOTHING = 0 /* NULL */, TRUTH, WHOLE, REAL, TEXT };

typedef struct {
    enum kind kind;
    uint32_t bytes; /* TEXT */
    union {
        int truth;
        int64_t whole;
        double real;
        const uint8_t *text;
    } as;
} value;

typedef struct {
    const uint8_t *at, *end;
} cursor;

static const value nothing = {.kind = NOTHING};

static value truth(int is) { return (value){.kind = TRUTH, .as.truth = is}; }

static value text(const uint8_t *at, uint32_t bytes) { return (value){.kind = TEXT, .bytes = bytes, .as.text = at}; }

/* The next `bytes` of the program, or NULL. */
static const uint8_t *take(cursor *c, uint32_t bytes)
{
    if ((uint64_t)(c->end - c->at) < bytes) {
        return NULL;
    }
    c->at += bytes;
    return c->at - bytes;
}

/* -- the record --------------------------------------------------------------------------------------------------- */

typedef struct {
    value slot[2 + SB_FILTER_NAMES_MAX]; /* tags, keys, then the named properties */
    uint32_t count;
} binding;

/* One pass over "name 0x01 value 0x02 ...", as parse_properties of the binding reads them: of two alike the last counts. */
static void bind_properties(binding *b, const value *names, const uint8_t *at, uint32_t bytes)
{
    const uint8_t *end = at + bytes;
    while (at < end && b->count > 2) {
        const uint8_t *pair_end = memchr(at, 0x02, (size_t)(end - at));
        pair_end = pair_end ? pair_end : end; /* the last may lack its 0x02 */
        const uint8_t *name_end = memchr(at, 0x01, (size_t)(pair_end - at));
        uint32_t name_bytes = name_end ? (uint32_t)(name_end - at) : 0;
        for (uint32_t i = 2; name_end && i < b->count; i++) {
            if (names[i].bytes == name_bytes && memcmp(names[i].as.text, at, name_bytes) == 0) {
                b->slot[i] = text(name_end + 1, (uint32_t)(pair_end - name_end - 1));
            }
        }
        at = pair_end < end ? pair_end + 1 : end;
    }
}

static int bind(binding *b, cursor *c, const sb_record *h, const uint8_t *payload)
{
    value names[2 + SB_FILTER_NAMES_MAX];
    const uint8_t *count = take(c, 1);
    if (!count || *count > SB_FILTER_NAMES_MAX) {
        return SB_INVALID;
    }
    b->count = 2u + *count;
    b->slot[0] = h->tags_bytes ? text(payload, h->tags_bytes) : nothing;
    b->slot[1] = h->keys_bytes ? text(payload + h->tags_bytes, h->keys_bytes) : nothing;
    for (uint32_t i = 2; i < b->count; i++) {
        const uint8_t *bytes = take(c, 1), *name = bytes ? take(c, *bytes) : NULL;
        if (!name) {
            return SB_INVALID;
        }
        names[i] = text(name, *bytes);
        b->slot[i] = nothing;
    }
    bind_properties(b, names, payload + h->tags_bytes + h->keys_bytes, h->properties_bytes);
    return SB_OK;
}

/* -- text as something else --------------------------------------------------------------------------------------- */

static size_t digits(const char *at)
{
    size_t n = 0;
    while (at[n] >= '0' && at[n] <= '9') {
        n++;
    }
    return n;
}

/* Sign, digits with a point somewhere, exponent: nothing else is a number, whatever strtod would take. Bytes up to the NUL. */
static int is_number(const char *at, int *is_whole)
{
    at += *at == '+' || *at == '-';
    size_t before = digits(at), after = 0;
    at += before;
    *is_whole = *at == '\0';
    if (*at == '.') {
        after = digits(at + 1);
        at += 1 + after;
    }
    if (before + after > 0 && (*at == 'e' || *at == 'E')) {
        at += 1;
        at += *at == '+' || *at == '-';
        size_t exponent = digits(at);
        at += exponent;
        after = exponent ? after : 0;
        before = exponent ? before : 0;
    }
    return before + after > 0 && *at == '\0';
}

/* Not the process's locale, which may want a comma. glibc answers with an object of its own: nothing to free. */
static locale_t plain_locale(void) { return newlocale(LC_ALL_MASK, "C", (locale_t)0); }

static int64_t whole_of(const char *at, int *fits)
{
    int negative = *at == '-';
    uint64_t limit = (uint64_t)INT64_MAX + (uint64_t)negative, n = 0;
    at += *at == '+' || *at == '-';
    for (*fits = 1; *at && *fits; at++) {
        uint64_t digit = (uint64_t)(*at - '0');
        *fits = n <= (limit - digit) / 10;
        n = n * 10 + digit;
    }
    return negative ? (int64_t)(0 - n) : (int64_t)n;
}

static value as_number(value v)
{
    char copy[SB_FILTER_NUMBER_MAX + 1];
    int is_whole, fits;
    if (v.kind == WHOLE || v.kind == REAL) {
        return v;
    }
    if (v.kind != TEXT || v.bytes > SB_FILTER_NUMBER_MAX || memchr(v.as.text, '\0', v.bytes)) {
        return nothing;
    }
    memcpy(copy, v.as.text, v.bytes);
    copy[v.bytes] = '\0';
    if (!is_number(copy, &is_whole)) {
        return nothing;
    }
    if (is_whole) {
        int64_t whole = whole_of(copy, &fits);
        if (fits) {
            return (value){.kind = WHOLE, .as.whole = whole};
        }
    }
    return (value){.kind = REAL, .as.real = strtod_l(copy, NULL, plain_locale())};
}

/* Java's Boolean.valueOf: all that is not "true" is false. */
static value as_truth(value v)
{
    if (v.kind == TEXT) {
        return truth(v.bytes == 4 && strncasecmp((const char *)v.as.text, "true", 4) == 0);
    }
    return v.kind == TRUTH ? v : nothing;
}

/* -- instructions ------------------------------------------------------------------------------------------------- */

enum order { BELOW = 1, SAME = 2, ABOVE = 4 };

/* NULL if one of them is no number, else whether their order is among `wanted`. NaN, which no text makes, has none. */
static value compare_numbers(value left, value right, int wanted)
{
    left = as_number(left);
    right = as_number(right);
    if (left.kind == NOTHING || right.kind == NOTHING) {
        return nothing;
    }
    if (left.kind == WHOLE && right.kind == WHOLE) {
        int order = left.as.whole < right.as.whole ? BELOW : left.as.whole == right.as.whole ? SAME : ABOVE;
        return truth((order & wanted) != 0);
    }
    double l = left.kind == WHOLE ? (double)left.as.whole : left.as.real;
    double r = right.kind == WHOLE ? (double)right.as.whole : right.as.real;
    int order = l < r ? BELOW : l > r ? ABOVE : l >= r ? SAME : 0;
    return truth((order & wanted) != 0);
}

static value equal(value left, value right)
{
    if (left.kind == NOTHING || right.kind == NOTHING) {
        return nothing;
    }
    if (left.kind == TEXT && right.kind == TEXT) {
        return truth(left.bytes == right.bytes && memcmp(left.as.text, right.as.text, left.bytes) == 0);
    }
    if (left.kind == TRUTH || right.kind == TRUTH) {
        left = as_truth(left);
        right = as_truth(right);
        return left.kind == NOTHING || right.kind == NOTHING ? nothing : truth(left.as.truth == right.as.truth);
    }
    return compare_numbers(left, right, SAME);
}

static value search(value in, value part, uint8_t instruction)
{
    if (in.kind != TEXT || part.kind != TEXT) {
        return nothing;
    }
    if (part.bytes > in.bytes) {
        return truth(0);
    }
    if (instruction == SB_FILTER_CONTAINS) {
        return truth(part.bytes == 0 || memmem(in.as.text, in.bytes, part.as.text, part.bytes) != NULL);
    }
    const uint8_t *at = instruction == SB_FILTER_STARTS ? in.as.text : in.as.text + (in.bytes - part.bytes);
    return truth(memcmp(at, part.as.text, part.bytes) == 0);
}

/* `decisive` decides whatever the other is: FALSE for AND, TRUE for OR. */
static value combine(value left, value right, int decisive)
{
    left = as_truth(left);
    right = as_truth(right);
    if ((left.kind == TRUTH && left.as.truth == decisive) || (right.kind == TRUTH && right.as.truth == decisive)) {
        return truth(decisive);
    }
    return left.kind == NOTHING || right.kind == NOTHING ? nothing : truth(!decisive);
}

static value of_two(value left, value right, uint8_t instruction)
{
    switch (instruction) {
    case SB_FILTER_EQUAL:
        return equal(left, right);
    case SB_FILTER_LESS:
        return compare_numbers(left, right, BELOW);
    case SB_FILTER_AT_MOST:
        return compare_numbers(left, right, BELOW | SAME);
    case SB_FILTER_AND:
        return combine(left, right, 0);
    case SB_FILTER_OR:
        return combine(left, right, 1);
    default:
        return search(left, right, instruction);
    }
}

static value of_one(value v, uint8_t instruction)
{
    if (instruction == SB_FILTER_IS_NULL) {
        return truth(v.kind == NOTHING);
    }
    v = as_truth(v);
    return v.kind == NOTHING ? v : truth(!v.as.truth);
}

/* The operand of a pushing instruction as a value. SB_OK | SB_INVALID */
static int operand(uint8_t instruction, const binding *b, cursor *c, value *v)
{
    const uint8_t *at = NULL;
    uint16_t bytes;
    switch (instruction) {
    case SB_FILTER_PROPERTY:
        at = take(c, 1);
        if (!at || *at >= b->count) {
            return SB_INVALID;
        }
        *v = b->slot[*at];
        return SB_OK;
    case SB_FILTER_TEXT:
        at = take(c, sizeof bytes);
        if (at) {
            memcpy(&bytes, at, sizeof bytes);
            at = take(c, bytes);
        }
        if (at) {
            *v = text(at, bytes);
        }
        break;
    case SB_FILTER_WHOLE:
        at = take(c, sizeof v->as.whole);
        v->kind = WHOLE;
        if (at) {
            memcpy(&v->as.whole, at, sizeof v->as.whole);
        }
        break;
    case SB_FILTER_REAL:
        at = take(c, sizeof v->as.real);
        v->kind = REAL;
        if (at) {
            memcpy(&v->as.real, at, sizeof v->as.real);
        }
        break;
    default: /* SB_FILTER_TRUE */
        *v = truth(1);
        return SB_OK;
    }
    return at ? SB_OK : SB_INVALID;
}

int sb_filter_run(const uint8_t *program, uint32_t program_bytes, const sb_record *header, const uint8_t *payload)
{
    cursor c = {program, program + program_bytes};
    value stack[SB_FILTER_STACK_MAX];
    uint32_t depth = 0;
    binding b;
    if (bind(&b, &c, header, payload) != SB_OK) {
        return SB_INVALID;
    }
    while (c.at < c.end) {
        uint8_t instruction = *c.at++;
        if (instruction >= SB_FILTER_PROPERTY && instruction <= SB_FILTER_TRUE) {
            if (depth == SB_FILTER_STACK_MAX || operand(instruction, &b, &c, &stack[depth]) != SB_OK) {
                return SB_INVALID;
            }
            depth += 1;
        } else if (instruction >= SB_FILTER_EQUAL && instruction <= SB_FILTER_OR) {
            if (depth < 2) {
                return SB_INVALID;
            }
            depth -= 1;
            stack[depth - 1] = of_two(stack[depth - 1], stack[depth], instruction);
        } else if (instruction == SB_FILTER_NOT || instruction == SB_FILTER_IS_NULL) {
            if (depth < 1) {
                return SB_INVALID;
            }
            stack[depth - 1] = of_one(stack[depth - 1], instruction);
        } else {
            return SB_INVALID;
        }
    }
    if (depth != 1) {
        return SB_INVALID;
    }
    value result = as_truth(stack[0]);
    return result.kind == TRUTH && result.as.truth;
}
