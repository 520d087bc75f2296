/* claim.c */
typedef int sb_claim_placeholder;
