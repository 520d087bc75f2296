/* crc32c.c */
typedef int sb_crc32c_placeholder;
