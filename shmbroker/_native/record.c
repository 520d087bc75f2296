/* record.c */
typedef int sb_record_placeholder;
