/* scan.c */
typedef int sb_scan_placeholder;
