/* wait.c */
typedef int sb_wait_placeholder;
