/* filter_test.c: programs and properties of all kinds in buffers with nothing behind them: the sanitizers see every step
 * too far. What expressions mean is compared with a model in tests/test_sql_filter.py. */
#include "check.h"
#include "codes.h"
#include "filter.h"

#define PROGRAM_MAX 512u
#define RUNS 200000u

static uint64_t random_state = 0x2545f4914f6cdd1dull;

static uint32_t random_below(uint32_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 33) % limit;
}

/* Run with program and payload each at the end of a buffer of exactly its size. */
static int run_exactly(const uint8_t *program, uint32_t program_bytes, const sb_record *header, const uint8_t *payload)
{
    size_t payload_bytes = (size_t)header->tags_bytes + header->keys_bytes + header->properties_bytes;
    uint8_t *own_program = malloc(program_bytes + 1), *own_payload = malloc(payload_bytes + 1);
    CHECK(own_program && own_payload);
    memcpy(own_program + 1, program, program_bytes);
    memcpy(own_payload + 1, payload, payload_bytes);
    int answer = sb_filter_run(own_program + 1, program_bytes, header, own_payload + 1);
    free(own_program);
    free(own_payload);
    return answer;
}

/* A payload that looks like tags, keys and properties more often than not. */
static void random_payload(sb_record *header, uint8_t *payload)
{
    static const char letters[] = "\x01\x01\x02\x02" "ab1.-+eE\0\xffTRUE";
    *header = (sb_record){.tags_bytes = (uint16_t)random_below(8), .keys_bytes = (uint16_t)random_below(8),
                          .properties_bytes = (uint16_t)random_below(100)};
    uint32_t bytes = (uint32_t)header->tags_bytes + header->keys_bytes + header->properties_bytes;
    for (uint32_t i = 0; i < bytes; i++) {
        payload[i] = (uint8_t)letters[random_below(sizeof letters - 1)];
    }
}

/* A program that keeps the rules of the stack, with operands of any value; its size. */
static uint32_t put_program(uint8_t *program)
{
    uint32_t at = 0, names = random_below(4), depth = 0;
    program[at++] = (uint8_t)names;
    for (uint32_t i = 0; i < names; i++) {
        program[at++] = 1;
        program[at++] = (uint8_t)"ab1"[i];
    }
    while (at < PROGRAM_MAX - SB_FILTER_STACK_MAX - 16 && (depth != 1 || random_below(12))) {
        uint8_t instruction = (uint8_t)(1 + random_below(15));
        if (instruction <= SB_FILTER_TRUE && depth < SB_FILTER_STACK_MAX) {
            program[at++] = instruction;
            uint32_t operand = instruction == SB_FILTER_PROPERTY ? 1 : instruction == SB_FILTER_TRUE ? 0 : 8;
            if (instruction == SB_FILTER_TEXT) {
                operand = random_below(6);
                program[at++] = (uint8_t)operand;
                program[at++] = 0;
            }
            for (uint32_t i = 0; i < operand; i++) {
                program[at++] = (uint8_t)(instruction == SB_FILTER_PROPERTY ? random_below(2 + names) : random_below(256));
            }
            depth += 1;
        } else if (instruction >= SB_FILTER_NOT ? depth >= 1 : instruction >= SB_FILTER_EQUAL && depth >= 2) {
            program[at++] = instruction;
            depth -= instruction < SB_FILTER_NOT;
        }
    }
    for (; depth > 1; depth--) {
        program[at++] = SB_FILTER_OR;
    }
    return at;
}

static void a_program_that_keeps_the_rules_answers_for_every_record(void)
{
    uint8_t program[PROGRAM_MAX], payload[128];
    sb_record header, empty = {.size = 0};
    uint32_t accepted = 0;
    for (uint32_t i = 0; i < RUNS; i++) {
        uint32_t bytes = put_program(program);
        random_payload(&header, payload);
        int answer = run_exactly(program, bytes, &header, payload);
        CHECK(answer == 0 || answer == 1);
        CHECK(run_exactly(program, bytes, &empty, payload) != SB_INVALID);
        accepted += (uint32_t)answer;
    }
    CHECK(accepted > RUNS / 20 && accepted < RUNS - RUNS / 20);
}

static void damaged_and_random_programs_are_run_within_their_bounds(void)
{
    uint8_t program[PROGRAM_MAX], payload[128];
    sb_record header, empty = {.size = 0};
    uint32_t invalid = 0;
    for (uint32_t i = 0; i < RUNS; i++) {
        uint32_t bytes = put_program(program);
        for (uint32_t changes = 1 + random_below(4); changes > 0; changes--) {
            program[random_below(bytes)] = (uint8_t)random_below(random_below(2) ? 256 : 17);
        }
        bytes = random_below(4) ? bytes : random_below(bytes + 1);
        random_payload(&header, payload);
        int answer = run_exactly(program, bytes, &header, payload);
        CHECK(answer == 0 || answer == 1 || answer == SB_INVALID);
        CHECK_EQ(run_exactly(program, bytes, &empty, payload) == SB_INVALID, answer == SB_INVALID); /* whatever the record */
        invalid += answer == SB_INVALID;
    }
    CHECK(invalid > RUNS / 20 && invalid < RUNS - RUNS / 20);
}

static void check_number(const char *value, double limit, int expected)
{
    uint8_t program[32] = {1, 1, 'a', SB_FILTER_PROPERTY, 2, SB_FILTER_REAL}, payload[128] = "a\x01";
    memcpy(program + 6, &limit, sizeof limit);
    program[14] = SB_FILTER_EQUAL;
    uint32_t bytes = (uint32_t)strlen(value);
    memcpy(payload + 2, value, bytes);
    sb_record header = {.properties_bytes = (uint16_t)(2 + bytes)}; /* without the 0x02 that ends it */
    CHECK_EQ(run_exactly(program, 15, &header, payload), expected);
}

static void text_is_read_as_a_number_only_if_all_of_it_is_one(void)
{
    check_number("1.5", 1.5, 1);
    check_number("+15e-1", 1.5, 1);
    check_number("-.5", -0.5, 1);
    check_number("9223372036854775808", 9223372036854775808.0, 1);
    static const char *const others[] = {"", "+", ".", "e1", "1e", "1e+", "1.5 ", " 1.5", "1,5", "0x1", "nan", "inf", "1.5f", "--1"};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        check_number(others[i], 1.5, 0);
    }
}

static void of_a_name_that_stands_twice_the_last_value_counts(void)
{
    static const uint8_t program[] = {1, 1, 'a', SB_FILTER_PROPERTY, 2, SB_FILTER_TEXT, 1, 0, 'y', SB_FILTER_EQUAL};
    static const char payload[] = "a\x01x\x02nothing\x02" "aa\x01z\x02" "a\x01y\x02";
    sb_record header = {.properties_bytes = sizeof payload - 1};
    CHECK_EQ(run_exactly(program, sizeof program, &header, (const uint8_t *)payload), 1);
}

int main(int argc, char **argv)
{
    static const check_test tests[] = {
        TEST(a_program_that_keeps_the_rules_answers_for_every_record),
        TEST(damaged_and_random_programs_are_run_within_their_bounds),
        TEST(text_is_read_as_a_number_only_if_all_of_it_is_one),
        TEST(of_a_name_that_stands_twice_the_last_value_counts),
    };
    return CHECK_MAIN(tests);
}
