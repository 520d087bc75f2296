/* filter.h: SQL92 expressions of subscriptions, compiled by selector.py, run here on the properties of a record.
 *
 * A program is postfix code without jumps: it is run to its end, on a stack, whatever its values are.
 *
 *    +-------+---------------------+------------------------------+
 *    | names | size | name | ...   | instruction | operand | ...  |
 *    +-------+---------------------+------------------------------+
 *      1       1      size           1             as below
 *
 * Neither program nor record is trusted: each byte is looked at within its bounds, each time. Since there are no jumps, a
 * program that runs on one record runs on all: SB_INVALID for an empty record means that the program is wrong. */
#ifndef SHMBROKER_FILTER_H
#define SHMBROKER_FILTER_H

#include "layout.h"

#define SB_FILTER_NAMES_MAX 64u
#define SB_FILTER_STACK_MAX 64u
#define SB_FILTER_NUMBER_MAX 64u /* characters of a property that is read as a number */

/* Values are NULL, TRUE, FALSE, whole numbers, floating-point numbers, and text; properties are text, or NULL if they are
 * missing. Text is read as what it is compared with. What cannot be read so is NULL, and so is what is compared with NULL. */
enum sb_filter_instruction {
    SB_FILTER_PROPERTY = 1, /* push. Operand, 1 byte: 0 the tags, 1 the keys, 2 + n the property that has the n-th name */
    SB_FILTER_TEXT = 2,     /* push. Operand: size (2 bytes) and so many bytes */
    SB_FILTER_WHOLE = 3,    /* push. Operand: 8 bytes, signed */
    SB_FILTER_REAL = 4,     /* push. Operand: 8 bytes, a double */
    SB_FILTER_TRUE = 5,     /* push */
    SB_FILTER_EQUAL = 6,    /* two values -> one; likewise the next seven */
    SB_FILTER_LESS = 7,
    SB_FILTER_AT_MOST = 8,
    SB_FILTER_CONTAINS = 9,
    SB_FILTER_STARTS = 10,
    SB_FILTER_ENDS = 11,
    SB_FILTER_AND = 12,
    SB_FILTER_OR = 13,
    SB_FILTER_NOT = 14,    /* one value -> one */
    SB_FILTER_IS_NULL = 15 /* one value -> one */
};

/* Whether the program accepts the record, whose tags, keys and properties stand at `payload`: 1 | 0: its result is FALSE or
 * NULL | SB_INVALID: it is no program. */
int sb_filter_run(const uint8_t *program, uint32_t program_bytes, const sb_record *header, const uint8_t *payload);

#endif
